// Newton–Schulz iterations on all matrices in one launch, by wgmma. An iteration is three GEMMs,
//   gram = x·xᵀ,  poly = c·gram² + b·gram,  next = poly·x + a·x
// in 16-bit storage, with float32 accumulators, rounded once. The first two are symmetric: only tiles on and below the
// diagonal are computed, and each one below is written twice, as it is and transposed, so that both halves have the
// same bits.
//
// The kernel is persistent, a block an SM, with a dynamic tile scheduler: blocks take 128×128 tiles in the order of
// their numbers (iteration_tiles.h), so that no GEMM waits for the last tile of another matrix, and all end together.
// Which block computes a tile changes no bit. A tile waits until the GEMM before it of the same matrix is complete;
// what it waits for has smaller numbers, taken by blocks that already run, so that there is no deadlock.
//
// Two consumer warpgroups of a block take turns (ping-pong): while one is in its main loop, the other is in its
// epilogue. Of a third warpgroup, one warp is the scheduler, which puts the next tile into a queue, and one the
// producer, which loads by TMA.
#pragma once

#include <algorithm>
#include <span>

#include "cuda/iteration_tiles.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tiles.cuh"

namespace pgolf::cuda::sm90 {

struct NewtonSchulzTiles {
  static constexpr int kSide = 128;  // of a tile of the result
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kHalf = kSide / 2;  // rows of one wgmma, and of a box
  static constexpr int kBoxBytes = kHalf * kBoxColumns * 2, kOperandBytes = 2 * kBoxBytes;
  static constexpr int kStageBytes = 2 * kOperandBytes, kStages = 5;
  static constexpr int kWarpTile = SharedTile<kSide>::bytes(16), kWarps = kConsumers * kWarpgroup / kWarp;
  static constexpr int kQueueStages = 2 * kConsumers;  // tiles that are scheduled and not yet begun
  using Operands = Pipeline<kStages>;
  using Queue = Pipeline<kQueueStages>;
  static constexpr int kTiles = kStages * kStageBytes, kBarriers = kTiles + 2 * kWarps * kWarpTile;
  static constexpr int kQueueEntries =
      kBarriers + Operands::kBarrierBytes + PingPong::kBarrierBytes + Queue::kBarrierBytes + 8;
  struct QueueEntry {
    IterationTile tile;
    int box;  // boxes along k in all tiles of this block before it; −1: there are no more tiles
  };
  static constexpr int kSharedBytes =
      kSwizzleBytes + kQueueEntries + kQueueStages * static_cast<int>(sizeof(QueueEntry));
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};
static_assert(NewtonSchulzTiles::kSharedBytes <= 227 * 1024 && NewtonSchulzTiles::kConsumers == PingPong::kWarpgroups);

// `count` matrices x [r, c], one after another, with what belongs to them; r and c are multiples of 8.
struct WideMatrices {
  i64 count, r, c;
  void *x = nullptr, *next = nullptr;     // [r, c]
  void *gram = nullptr, *poly = nullptr;  // [r, r]
};

template <class S>
struct IterationArgs {
  struct Group {
    CUtensorMap x_map[2], gram_map, poly_map;
    S *x[2], *gram, *poly;  // a step reads x[step % 2] and writes the other one
    int r, c;
    unsigned* finished;  // of each matrix: warps that have finished a tile
  };
  Group groups[IterationTiles::kGroups];
  IterationTiles tiles;
  struct Polynomial {
    float a, b, c;
  };
  int steps, last;  // last: of the polynomials, which later steps take, too
  Polynomial polynomials[NewtonSchulzSteps::kMost];
  unsigned* next_tile;
};

static_assert(sizeof(IterationArgs<bf16>) <=
              32'764);  // what a launch takes since CUDA 12.1; sm_90a is here built by 13

// The operands of one GEMM of a group's matrices, [rows, columns] each.
template <class S>
struct StageOperands {
  const CUtensorMap *left, *right;
  const S* addend;
  S* out;
  int rows, columns, boxes;
  bool over_rows;  // left·right, else left·rightᵀ

  __device__ StageOperands(const typename IterationArgs<S>::Group& g, const IterationTile& tile)
      : rows(g.r), over_rows(tile.stage == Stage::quintic) {
    const CUtensorMap* const x_map = &g.x_map[tile.step % 2];
    S *const x = g.x[tile.step % 2], *const next = g.x[1 - tile.step % 2];
    left = tile.stage == Stage::gram ? x_map : tile.stage == Stage::quartic ? &g.gram_map : &g.poly_map;
    right = over_rows ? x_map : left;
    addend = tile.stage == Stage::gram ? nullptr : over_rows ? x : g.gram;
    out = tile.stage == Stage::gram ? g.gram : over_rows ? next : g.poly;
    columns = over_rows ? g.c : g.r;
    boxes = ((tile.stage == Stage::gram ? g.c : g.r) + kBoxColumns - 1) / kBoxColumns;
  }
};

// The epilogue of a warp's 16 rows of a tile: x is the accumulator, `tile` 4 KiB of its own that hold the addend where
// round_rows puts the rounded results.
template <class S>
__device__ __forceinline__ void epilogue_rows(unsigned char* tile, Accumulator<1, NewtonSchulzTiles::kSide>& x,
                                              bool adds, float alpha, float beta, S* out, int rows, int columns,
                                              int first_row, int first_column, bool mirrored) {
  using Tile = SharedTile<NewtonSchulzTiles::kSide>;
  if (adds) {
#pragma unroll
    for (int n = 0; n < Tile::kChunks; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const auto* at =
            reinterpret_cast<const unsigned*>(tile + Tile::offset(lane_row(i), n) + lane_column(i) * sizeof(S));
        const float2 more = unpack<S>(*at);
        x[0][n][i] = fmaf(beta, more.x, alpha * x[0][n][i]);
        x[0][n][i + 1] = fmaf(beta, more.y, alpha * x[0][n][i + 1]);
      }
  }
  store_rows<S, NewtonSchulzTiles::kSide, 1>(tile, x, out + (i64{first_row} * columns + first_column), columns, 0,
                                             rows - first_row, columns - first_column);
  if (mirrored) {
    const int lane = threadIdx.x % kWarp, column = first_row + kVector * TransposedRead::half(lane);
#pragma unroll
    for (int pass = 0; pass < TransposedRead::kPasses; ++pass) {
      unsigned r[4];
      const TransposedRead::Chunk from = TransposedRead::source(pass, lane / 8, lane % 8);
      ldmatrix_x4_trans(r, shared_address(tile + Tile::offset(from.row, from.chunk)));
      const int row = first_column + TransposedRead::column(pass, lane);  // above the diagonal: there is such a row
      if (column < columns) *reinterpret_cast<uint4*>(out + (i64{row} * columns + column)) = {r[0], r[1], r[2], r[3]};
    }
  }
}

template <class S>
__global__ void __launch_bounds__(NewtonSchulzTiles::kThreads, 1)
    newton_schulz(const __grid_constant__ IterationArgs<S> args) {
  using Tiles = NewtonSchulzTiles;
  extern __shared__ unsigned char raw[];
  unsigned char* const shared = align_shared(raw);
  const unsigned slots = shared_address(shared);
  auto* const entries = reinterpret_cast<Tiles::QueueEntry*>(shared + Tiles::kQueueEntries);
  const Tiles::Operands pipeline{slots + Tiles::kBarriers};
  const PingPong turns{pipeline.barriers + Tiles::Operands::kBarrierBytes};
  const Tiles::Queue queue{turns.barriers + PingPong::kBarrierBytes};
  const unsigned load_started = queue.barriers + Tiles::Queue::kBarrierBytes;
  if (threadIdx.x == 0) {
    pipeline.init(kWarpgroup / kWarp);
    turns.init();
    queue.init(1 + kWarpgroup / kWarp * kWarpArrivals);  // who loads, and who multiplies
    mbarrier_init(load_started, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(uniform(threadIdx.x / kWarpgroup));
  if (warpgroup == Tiles::kConsumers) {
    warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
    const int role = static_cast<int>(threadIdx.x) - Tiles::kConsumers * kWarpgroup;
    if (role == kWarp) {
      // Takes a tile when the loads of the one before begin, no earlier: at the end few wait in one block's queue.
      PipelineState slot = PipelineState::of_producer();
      int load_phase = 1, box = 0;
      const auto enqueue = [&](const IterationTile& tile, int first_box) {
        queue.acquire(slot);
        entries[slot.stage] = {tile, first_box};
        queue.commit(slot);
        queue.advance(slot);
      };
      const unsigned all = static_cast<unsigned>(args.steps * args.tiles.of_step());
      while (true) {
        mbarrier_wait(load_started, load_phase);  // at once for the first
        load_phase ^= 1;
        const unsigned number = atomicAdd(args.next_tile, 1u);
        if (number >= all) break;
        const IterationTile tile = args.tiles.at(static_cast<int>(number));
        const auto& group = args.groups[tile.group];
        acquire_at_least(group.finished + tile.at.matrix, static_cast<unsigned>(tile.before) * (kWarpgroup / kWarp));
        enqueue(tile, box);
        box += StageOperands<S>(group, tile).boxes;
      }
      for (int consumer = 0; consumer < Tiles::kConsumers; ++consumer) enqueue({}, -1);
    } else if (role == 0) {
      PipelineState to = PipelineState::of_producer(), slot = PipelineState::of_consumer();
      while (true) {
        queue.wait(slot);
        const Tiles::QueueEntry work = entries[slot.stage];
        queue.release(slot.stage);
        queue.advance(slot);
        if (work.box < 0) return;
        mbarrier_arrive(load_started);
        const IterationTile& tile = work.tile;
        const StageOperands<S> operands(args.groups[tile.group], tile);
        const bool diagonal = !operands.over_rows && tile.at.row == tile.at.column;
        for (int k = 0; k < operands.boxes; ++k, pipeline.advance(to)) {
          const unsigned left = slots + to.stage * Tiles::kStageBytes, right = left + Tiles::kOperandBytes;
          const unsigned full = pipeline.acquire(to, diagonal ? Tiles::kOperandBytes : Tiles::kStageBytes);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            tma_load(left + half * Tiles::kBoxBytes, operands.left, k * kBoxColumns,
                     tile.at.row * Tiles::kSide + half * Tiles::kHalf, tile.at.matrix, full);
            if (diagonal) continue;
            const int across = tile.at.column * Tiles::kSide + half * Tiles::kHalf, along = k * kBoxColumns;
            tma_load(right + half * Tiles::kBoxBytes, operands.right, operands.over_rows ? across : along,
                     operands.over_rows ? along : across, tile.at.matrix, full);
          }
        }
      }
    }
    return;
  }

  warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned char* const own_tiles = shared + Tiles::kTiles + warp * 2 * Tiles::kWarpTile;
  int number = warpgroup;  // of this block's tiles
  int turn_phase = PingPong::first_phase(warpgroup);
  while (true) {
    const PipelineState slot = queue.at(number);
    number += Tiles::kConsumers;
    queue.wait(slot);
    const Tiles::QueueEntry work = entries[slot.stage];
    __syncwarp();  // all lanes have read it
    queue.release_warp(slot.stage);
    if (work.box < 0) return;
    const auto& group = args.groups[work.tile.group];
    const ProductTile at = work.tile.at;
    const StageOperands<S> operands(group, work.tile);
    const int row = at.row * Tiles::kSide + warp % 4 * 16, column = at.column * Tiles::kSide;
    const i64 begin = i64{at.matrix} * operands.rows * operands.columns;
    const bool mirrored = !operands.over_rows && at.row != at.column;
    if (operands.addend) {
      using Tile = SharedTile<Tiles::kSide>;
#pragma unroll
      for (int i = 0; i < 2 * 16 * Tile::kChunks / kWarp; ++i) {
        const int index = i * kWarp + lane, chunk = index % Tile::kChunks, tile_row = index / Tile::kChunks;
        const int half = tile_row / 16, r = row + half * Tiles::kHalf + tile_row % 16, c = column + chunk * kVector;
        const bool valid = r < operands.rows && c < operands.columns;
        cp_async_16(shared_address(own_tiles + half * Tiles::kWarpTile + Tile::offset(tile_row % 16, chunk)),
                    operands.addend + (valid ? begin + i64{r} * operands.columns + c : 0), valid);
      }
    }

    // Zeroed while the other warpgroup's last wgmma run: if the first wgmma overwrote the accumulator instead, ptxas
    // would serialise the two loops below.
    float accumulator[2][16][4] = {};
    int before = 0;
    const auto multiply = [&](auto over_rows) {
      for (int k = 0; k < operands.boxes; ++k) {
        const PipelineState box = pipeline.at(work.box + k);
        pipeline.wait(box);
        wgmma_fence();
        const unsigned left_box = slots + box.stage * Tiles::kStageBytes;
        const unsigned right_box = over_rows.value || mirrored ? left_box + Tiles::kOperandBytes : left_box;
        const std::uint64_t left = matrix_descriptor(left_box);
        const std::uint64_t right = matrix_descriptor(right_box, over_rows.value ? Tiles::kBoxBytes : 0);
#pragma unroll
        for (int part = 0; part < kBoxColumns / 16; ++part) {
          const std::uint64_t b = advance_descriptor(right, part * (over_rows.value ? 2048 : 32));
#pragma unroll
          for (int half = 0; half < 2; ++half)
            wgmma_m64n128k16<S, over_rows.value ? Major::mn : Major::k>(
                accumulator[half], advance_descriptor(left, half * Tiles::kBoxBytes + part * 32), b, true);
        }
        wgmma_commit_group();
        wgmma_wait_group<1>();
        if (k > 0 && lane == 0) pipeline.release(before);
        before = box.stage;
      }
      if (lane == 0) turns.pass_on(warpgroup);
      wgmma_wait_group<0>();
      fence_operand(accumulator[0]);
      fence_operand(accumulator[1]);
    };
    turns.wait(warpgroup, turn_phase);
    turn_phase ^= 1;
    if (operands.over_rows)
      multiply(std::true_type{});
    else
      multiply(std::false_type{});
    if (lane == 0) pipeline.release(before);
    cp_async_wait_all();
    __syncwarp();
    const auto& polynomial = args.polynomials[min(work.tile.step, args.last)];
    const float alpha = operands.over_rows ? 1.0f : polynomial.c;
    const float beta = operands.over_rows ? polynomial.a : polynomial.b;
    const auto epilogue = [&](int half) {
      epilogue_rows<S>(own_tiles + half * Tiles::kWarpTile,
                       *reinterpret_cast<Accumulator<1, Tiles::kSide>*>(&accumulator[half]), operands.addend != nullptr,
                       alpha, beta, operands.out + begin, operands.rows, operands.columns, row + half * Tiles::kHalf,
                       column, mirrored);
    };
    epilogue(0);
    epilogue(1);
    fence_proxy_async();
    __syncwarp();  // all lanes have stored, and have read their tiles
    if (lane == 0) release_increment(group.finished + at.matrix, 1);
  }
}

// The steps for all matrices of all groups; after an odd number the result lies in `next`. state: zeros, one for each
// group and each matrix.
template <class S>
void launch_newton_schulz(const CudaBackend& backend, std::span<const WideMatrices> groups,
                          const NewtonSchulzSteps& steps, unsigned* state) {
  using Tiles = NewtonSchulzTiles;
  const DType dtype = backend.dtype();
  while (!groups.empty()) {
    IterationArgs<S> args{};
    args.steps = steps.steps;
    args.last = steps.count - 1;
    for (int i = 0; i < steps.count; ++i) {
      const NewtonSchulzSteps::Polynomial& p = steps.of(i);
      args.polynomials[i] = {static_cast<float>(p.a), static_cast<float>(p.b), static_cast<float>(p.c)};
    }
    args.next_tile = state++;
    const auto these = groups.first(std::min<std::size_t>(groups.size(), IterationTiles::kGroups));
    for (const WideMatrices& g : these) {
      const auto map = [&](const void* data, i64 columns) {
        return tensor_map(data, dtype, g.count, g.r, columns, Tiles::kHalf);
      };
      args.groups[args.tiles.groups] = {{map(g.x, g.c), map(g.next, g.c)},
                                        map(g.gram, g.r),
                                        map(g.poly, g.r),
                                        {static_cast<S*>(g.x), static_cast<S*>(g.next)},
                                        static_cast<S*>(g.gram),
                                        static_cast<S*>(g.poly),
                                        static_cast<int>(g.r),
                                        static_cast<int>(g.c),
                                        state};
      args.tiles.add(static_cast<int>(g.count), static_cast<int>(blocks_for(g.r, Tiles::kSide)),
                     static_cast<int>(blocks_for(g.c, Tiles::kSide)));
      state += g.count;
    }
    const auto kernel = newton_schulz<S>;
    PGOLF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::kSharedBytes));
    kernel<<<std::min(args.tiles.of_step(), backend.sm_count()), Tiles::kThreads, Tiles::kSharedBytes,
             backend.stream()>>>(args);
    PGOLF_LAUNCHED("newton_schulz");
    groups = groups.subspan(these.size());
  }
}

}  // namespace pgolf::cuda::sm90
