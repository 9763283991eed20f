// A persistent, weight-stationary GEMM by wgmma: y = epilogue(x·wᵀ) for x [rows, depth] and w [columns, depth] of
// 16-bit numbers, or epilogue(x·w) for w [depth, columns].
//
// The models here are narrow: all of depth of 128 columns of the result, 128 KiB of w at a depth of 512, fits an SM's
// shared memory. So a block keeps them there and streams tiles of 128 rows of x past them, which halves the traffic
// from L2. Two consumer warpgroups take turns (ping-pong): one is in its epilogue, which makes the rest of the layer's
// memory traffic, while the other one issues its wgmma. A producer thread of a third warpgroup loads by TMA.
//
// An epilogue is called by each warp with 16 rows: operator()(tile, accumulator, row, column) gets the accumulator of
// rows row … row+15 and columns column … column+127 as sixteen 16×8 tiles side by side, and 4 KiB of shared memory that
// no other warp uses; it says itself which rows exist. One that reads memory may have a method ahead(row, column) that
// returns what it reads: for the first half of a tile it is called before the main loop, which hides its loads, and
// operator() gets the result after the main loop. Where registers do not suffice, a method prefetch(row, column) may
// ask for what the epilogue of a tile of 128 rows reads: the producer calls it before it loads the tile's boxes of x.
#pragma once

#include <algorithm>

#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tiles.cuh"

namespace pgolf::cuda::sm90 {

using WarpAccumulator = Accumulator<1, 128>;

template <class Epilogue>
inline constexpr bool kReadsAhead = requires(const Epilogue& epilogue) { epilogue.ahead(i64{}, int{}); };
template <class Epilogue>
inline constexpr bool kPrefetches = requires(const Epilogue& epilogue) { epilogue.prefetch(i64{}, int{}); };

struct GemmTiles {
  static constexpr int kRows = 128, kColumns = 128;  // of a tile of the result
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kHalfRows = kRows / 2;                // of one wgmma
  static constexpr int kBoxBytes = kRows * kBoxColumns * 2;  // of x, and of w
  static constexpr int kWarpTile = SharedTile<kColumns>::bytes(16);
  static constexpr int kWarps = kConsumers * kWarpgroup / kWarp;
  static constexpr int kMostStages = 4;
  static constexpr int kMostShared = 227 * 1024;
  using Boxes = Pipeline<kMostStages>;
  static constexpr int kBarrierBytes = Boxes::kBarrierBytes + 8 + PingPong::kBarrierBytes;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  static constexpr int bytes(int depth_boxes, int stages) {
    return kSwizzleBytes + (depth_boxes + stages) * kBoxBytes + kWarps * kWarpTile + kBarrierBytes;
  }
  // Boxes of x in flight or in use.
  static constexpr int stages(int depth_boxes) {
    int count = kMostStages;
    while (count > 0 && bytes(depth_boxes, count) > kMostShared) --count;
    return count;
  }
};
static_assert(GemmTiles::kConsumers == PingPong::kWarpgroups);
static_assert(GemmTiles::stages(8) == 4 && GemmTiles::stages(10) == 2);

template <class S, Major kMajorB, class Epilogue>
__global__ void __launch_bounds__(GemmTiles::kThreads, 1)
    weight_stationary_gemm(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, int row_tiles,
                           int column_tiles, int depth_boxes, int stages, const __grid_constant__ Epilogue epilogue) {
  using Tiles = GemmTiles;
  extern __shared__ unsigned char raw[];
  unsigned char* const shared = align_shared(raw);
  const unsigned weights = shared_address(shared), boxes = weights + depth_boxes * Tiles::kBoxBytes;
  unsigned char* const tiles = shared + (depth_boxes + stages) * Tiles::kBoxBytes;
  const Tiles::Boxes pipeline{shared_address(tiles) + Tiles::kWarps * Tiles::kWarpTile, stages};
  const unsigned weights_full = pipeline.barriers + Tiles::Boxes::kBarrierBytes;
  const PingPong turns{weights_full + 8};
  if (threadIdx.x == 0) {
    pipeline.init(kWarpgroup / kWarp);
    mbarrier_init(weights_full, 1);
    turns.init();
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(uniform(threadIdx.x / kWarpgroup));
  const int column = static_cast<int>(blockIdx.x) % column_tiles * Tiles::kColumns;
  const int first_tile = static_cast<int>(blockIdx.x) / column_tiles, step = static_cast<int>(gridDim.x) / column_tiles;
  if (warpgroup == Tiles::kConsumers) {
    warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
    if (threadIdx.x != Tiles::kConsumers * kWarpgroup) return;
    prefetch_tensor_map(&x);
    mbarrier_arrive_expect_tx(weights_full, depth_boxes * Tiles::kBoxBytes);
    for (int k = 0; k < depth_boxes; ++k) {
      const unsigned to = weights + k * Tiles::kBoxBytes;
      if constexpr (kMajorB == Major::k) {
        tma_load(to, &w, k * kBoxColumns, column, 0, weights_full);
      } else {
        tma_load(to, &w, column, k * kBoxColumns, 0, weights_full);
        tma_load(to + Tiles::kBoxBytes / 2, &w, column + kBoxColumns, k * kBoxColumns, 0, weights_full);
      }
    }
    PipelineState box = PipelineState::of_producer();
    for (int tile = first_tile; tile < row_tiles; tile += step) {
      if constexpr (kPrefetches<Epilogue>) epilogue.prefetch(i64{tile} * Tiles::kRows, column);
      for (int k = 0; k < depth_boxes; ++k, pipeline.advance(box)) {
        const unsigned full = pipeline.acquire(box, Tiles::kBoxBytes);
        tma_load(boxes + box.stage * Tiles::kBoxBytes, &x, k * kBoxColumns, tile * Tiles::kRows, 0, full);
      }
    }
    return;
  }

  warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned char* const own_tile = tiles + warp * Tiles::kWarpTile;
  mbarrier_wait(weights_full, 0);
  // The warpgroups take turns, tile by tile, and a tile has depth_boxes consecutive stages: each skips those of the
  // other one's tile. Nobody waits for a box before the other one has seen the last of its own (Pipeline).
  PipelineState box = PipelineState::of_consumer();
  int turn_phase = PingPong::first_phase(warpgroup);
  const PipelineSkip skip_other_tile(pipeline, depth_boxes);
  if (warpgroup == 1) skip_other_tile(pipeline, box);
  for (int tile = first_tile + warpgroup * step; tile < row_tiles; tile += Tiles::kConsumers * step) {
    const auto row_of = [&](int half_tile) {
      return i64{tile} * Tiles::kRows + half_tile * Tiles::kHalfRows + warp % 4 * 16;
    };
    const auto read_ahead = [&](int half_tile) {
      if constexpr (kReadsAhead<Epilogue>)
        return epilogue.ahead(row_of(half_tile), column);
      else
        return 0;
    };
    [[maybe_unused]] auto ahead = read_ahead(0);
    float accumulator[2][16][4];
    int before = 0;
    // The compiler must see that the first wgmma overwrites the accumulator: else it keeps 128 registers live through
    // the epilogue of the tile before.
    const auto multiply_box = [&](int k, auto first) {
      pipeline.wait(box);
      wgmma_fence();
      const std::uint64_t rows = matrix_descriptor(boxes + box.stage * Tiles::kBoxBytes);
      const std::uint64_t columns =
          matrix_descriptor(weights + k * Tiles::kBoxBytes, kMajorB == Major::k ? 0 : Tiles::kBoxBytes / 2);
      constexpr int kStep = kMajorB == Major::k ? 32 : 16 * kBoxColumns * int(sizeof(S));  // of 16 numbers
#pragma unroll
      for (int part = 0; part < kBoxColumns / 16; ++part)
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile)
          wgmma_m64n128k16<S, kMajorB>(accumulator[half_tile],
                                       advance_descriptor(rows, half_tile * (Tiles::kBoxBytes / 2) + part * 32),
                                       advance_descriptor(columns, part * kStep), !first() || part > 0);
      wgmma_commit_group();
      wgmma_wait_group<1>();
      if (!first() && lane == 0) pipeline.release(before);
      before = box.stage;
      pipeline.advance(box);
    };
    turns.wait(warpgroup, turn_phase);
    turn_phase ^= 1;
    multiply_box(0, std::true_type{});
    for (int k = 1; k < depth_boxes; ++k) multiply_box(k, std::false_type{});
    if (lane == 0) turns.pass_on(warpgroup);
    wgmma_wait_group<0>();
    fence_operand(accumulator[0]);
    fence_operand(accumulator[1]);
    if (lane == 0) pipeline.release(before);
    skip_other_tile(pipeline, box);
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
      __syncwarp();  // all lanes have read the half before from the tile
      WarpAccumulator& rows = *reinterpret_cast<WarpAccumulator*>(&accumulator[half_tile]);
      if constexpr (kReadsAhead<Epilogue>) {
        const auto read = ahead;
        if (half_tile == 0) ahead = read_ahead(1);
        epilogue(own_tile, rows, read, row_of(half_tile), column);
      } else {
        epilogue(own_tile, rows, row_of(half_tile), column);
      }
    }
  }
}

// Whether weight_stationary_gemm takes these sizes.
inline bool gemm_fits(const CudaBackend& backend, i64 rows, i64 columns, i64 depth) {
  constexpr i64 kMostRows = i64{1} << 30;
  return backend.has_wgmma() && backend.dtype() != DType::f32 && rows <= kMostRows &&
         columns % GemmTiles::kColumns == 0 && depth % kBoxColumns == 0 &&
         GemmTiles::stages(static_cast<int>(std::min<i64>(depth, 1 << 20) / kBoxColumns)) >= 2;
}

template <class S, Major kMajorB = Major::k, class Epilogue>
void launch_weight_stationary_gemm(const CudaBackend& backend, const char* name, const void* x, const void* w, i64 rows,
                                   i64 columns, i64 depth, const Epilogue& epilogue) {
  using Tiles = GemmTiles;
  const int row_tiles = static_cast<int>(blocks_for(rows, Tiles::kRows));
  const int column_tiles = static_cast<int>(columns / Tiles::kColumns), boxes = static_cast<int>(depth / kBoxColumns);
  const int groups = std::clamp(backend.sm_count() / column_tiles, 1, row_tiles);
  const int stages = Tiles::stages(boxes), shared = Tiles::bytes(boxes, stages);
  const auto kernel = weight_stationary_gemm<S, kMajorB, Epilogue>;
  PGOLF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<column_tiles * groups, Tiles::kThreads, shared, backend.stream()>>>(
      tensor_map(x, backend.dtype(), 1, rows, depth, Tiles::kRows),
      kMajorB == Major::k ? tensor_map(w, backend.dtype(), 1, columns, depth, Tiles::kColumns)
                          : tensor_map(w, backend.dtype(), 1, depth, columns, kBoxColumns),
      row_tiles, column_tiles, boxes, stages, epilogue);
  PGOLF_LAUNCHED(name);
}

}  // namespace pgolf::cuda::sm90
