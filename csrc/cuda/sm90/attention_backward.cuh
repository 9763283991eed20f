// Attention backward by wgmma for heads of 64 numbers: the two kernels and formulas of cuda/attention_backward.cuh,
// each with two consumer warpgroups of 64 rows and a producer warp that streams tiles to them by TMA. A warpgroup's
// exponentials overlap its own next GEMM and those of the other warpgroup.
//
// dq leaves each query's log-sum-exp and gain·Σ dO⊙O for dkdv in contiguous blocks of 64 queries; a query past the last
// one has an infinite log-sum-exp, so that its probabilities are 0.
#pragma once

#include "cuda/sm90/attention_tiles.cuh"

namespace pgolf::cuda::sm90 {

// A tile of queries in dkdv, and what dq leaves of each query: [batch, H, tiles, kQueries / 2, 4] float32: log-sum-exp
// of two neighbours, then gain·Σ dO⊙O of both.
struct QueryRows {
  static constexpr int kQueries = 64, kNumbers = 2 * kQueries, kBytes = kNumbers * static_cast<int>(sizeof(float));
  static __host__ __device__ i64 tiles(int queries) { return (queries + kQueries - 1) / kQueries; }
  template <class S>
  static __device__ i64 at(const AttentionArgs<S>& a, int b, int h, int tile) {
    return ((i64{b} * a.H + h) * tiles(a.queries) + tile) * kNumbers;
  }
};

struct DqTiles {
  static constexpr int kKeys = 128, kOwnQueries = QueryRows::kQueries;
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup,
                       kWarps = kConsumers * kWarpgroup / kWarp;
  static constexpr int kQueries = kConsumers * kOwnQueries;
  static constexpr int kQueryBytes = kQueries * kHeadRowBytes, kQueryStages = 2;  // a stage: queries, dO, O
  static constexpr int kTileBytes = kKeys * kHeadRowBytes, kStages = 3;           // a stage: keys, values
  static constexpr int kWarpTile = SharedTile<kHeadWidth>::bytes(16);
  static constexpr int kSlots = 3 * kQueryStages * kQueryBytes, kTiles = kSlots + 2 * kStages * kTileBytes;
  static constexpr int kBarriers = kTiles + kWarps * kWarpTile;
  using Keys = Pipeline<kStages>;
  using Queries = Pipeline<kQueryStages>;
  static constexpr int kSharedBytes = kSwizzleBytes + kBarriers + Keys::kBarrierBytes + Queries::kBarrierBytes;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kGainRows = 16;  // queries of each partial sum of the gain's gradient: a warp's
};

template <class S>
__global__ void __launch_bounds__(DqTiles::kThreads, 1)
    attention_dq(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap d_o_map,
                 const __grid_constant__ CUtensorMap o_map, const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map, const AttentionArgs<S> a, const AttentionGradArgs<S> g,
                 const TileScheduler order) {
  using Tiles = DqTiles;
  using Rows = SharedTile<kHeadWidth>;
  constexpr int kKeys = Tiles::kKeys;
  extern __shared__ unsigned char raw[];
  unsigned char* const shared = align_shared(raw);
  const unsigned queries = shared_address(shared), slots = queries + Tiles::kSlots;
  const Tiles::Keys key_pipeline{queries + Tiles::kBarriers};
  const Tiles::Queries query_pipeline{key_pipeline.barriers + Tiles::Keys::kBarrierBytes};
  const auto keys_at = [&](int stage) { return slots + 2 * stage * Tiles::kTileBytes; };
  if (threadIdx.x == 0) {
    key_pipeline.init(Tiles::kWarps);
    query_pipeline.init(Tiles::kWarps * kWarpArrivals);
    mbarrier_init_fence();
  }
  __syncthreads();

  const unsigned blocks = static_cast<unsigned>(order.heads) * static_cast<unsigned>(order.tiles);
  const int warpgroup = static_cast<int>(uniform(threadIdx.x / kWarpgroup));
  if (warpgroup == Tiles::kConsumers) {
    warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
    if (threadIdx.x != Tiles::kConsumers * kWarpgroup) return;
    PipelineState key = PipelineState::of_producer(), query = PipelineState::of_producer();
    for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, query_pipeline.advance(query)) {
      const QueryTile<Tiles> at(a, order, block);
      const unsigned to = queries + 3 * query.stage * Tiles::kQueryBytes;
      const unsigned queries_full = query_pipeline.acquire(query, 3 * Tiles::kQueryBytes);
      tma_load(to, &q_map, at.h * kHeadWidth, at.first_query, at.b, queries_full);
      tma_load(to + Tiles::kQueryBytes, &d_o_map, at.h * kHeadWidth, at.first_query, at.b, queries_full);
      tma_load(to + 2 * Tiles::kQueryBytes, &o_map, at.h * kHeadWidth, at.first_query, at.b, queries_full);
      for (int tile = 0; tile < at.tiles; ++tile, key_pipeline.advance(key)) {
        const unsigned full = key_pipeline.acquire(key, 2 * Tiles::kTileBytes);
        tma_load(keys_at(key.stage), &k_map, at.kv * kHeadWidth, tile * kKeys, at.b, full);
        tma_load(keys_at(key.stage) + Tiles::kTileBytes, &v_map, at.kv * kHeadWidth, tile * kKeys, at.b, full);
      }
    }
    return;
  }

  warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool elected = lane == 0;
  unsigned char* const own_tile = shared + Tiles::kTiles + warp * Tiles::kWarpTile;
  const int gain_rows = (a.queries + Tiles::kGainRows - 1) / Tiles::kGainRows;
  PipelineState key = PipelineState::of_consumer(), query = PipelineState::of_consumer();
  for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x) {
    const QueryTile<Tiles> at(a, order, block);
    const int own_first = at.first_query + warpgroup * Tiles::kOwnQueries;
    const int warp_query = own_first + warp % 4 * 16, warp_position = warp_query + a.first();
    const int tiles = own_first < a.queries ? at.tiles_until(a, own_first + Tiles::kOwnQueries) : 0;
    const unsigned query_slot = 3 * query.stage * Tiles::kQueryBytes;
    const std::uint64_t own_rows =
        matrix_descriptor(uniform(queries + query_slot + warpgroup * Tiles::kOwnQueries * kHeadRowBytes));
    const std::uint64_t own_d_o = advance_descriptor(own_rows, Tiles::kQueryBytes);
    unsigned char* const warp_rows = shared + query_slot + warp * Tiles::kWarpTile;
    const i64 first_row = a.row_at(at.b, at.h);
    const float gain = a.gain[at.h], scale = softmax_scale_log2(gain, a.root);
    float lse[2];
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = warp_query + lane_row(2 * half_row);
      lse[half_row] = row < a.queries ? a.lse[first_row + row] : INFINITY;
    }

    query_pipeline.wait(query);
    float delta[2];
    {
      // Two lanes a row, half of its numbers each.
      float sum = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < Rows::kChunks / 2; ++chunk) {
        const unsigned char* const d_o =
            warp_rows + Tiles::kQueryBytes + Rows::offset(lane / 2, lane % 2 * (Rows::kChunks / 2) + chunk);
        const Vector8 x = load8(reinterpret_cast<const S*>(d_o));
        const Vector8 y = load8(reinterpret_cast<const S*>(d_o + Tiles::kQueryBytes));
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum = fmaf(x.x[j], y.x[j], sum);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      delta[0] = __shfl_sync(0xffffffffu, sum, 2 * lane_row(0));
      delta[1] = __shfl_sync(0xffffffffu, sum, 2 * lane_row(2));
    }
    // O's rows and the output tile are not needed until dq is stored: meanwhile they hold the angles.
    const bool past_norms = g.norms.cos != nullptr && tiles > 0;
    const SharedAngles angles{warp_rows + 2 * Tiles::kQueryBytes, own_tile};
    float factors[2];
    if (past_norms) {
      __syncwarp();
      angles.begin(g.norms.cos, g.norms.sin, warp_position, a.T);
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const int row = min(warp_query + lane_row(2 * half_row), a.queries - 1);
        factors[half_row] = gain * a.root * g.norms.q_factors[(i64{at.b} * a.queries + row) * a.H + at.h];
      }
    }
    if (tiles > 0 && lane_column(0) == 0) {
      float* const rows = g.delta + QueryRows::at(a, at.b, at.h, own_first / QueryRows::kQueries) + warp % 4 * 32;
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const int row = lane_row(2 * half_row);
        rows[row / 2 * 4 + row % 2] = lse[half_row];
        rows[row / 2 * 4 + row % 2 + 2] = gain * delta[half_row];
      }
    }

    Accumulator<1, kKeys> p, ds;
    Accumulator<1, kHeadWidth> dq = {};
    unsigned rounded[kKeys / 16][4];  // ds of the tile before
    int last = 0;                     // its stage
    const auto begin_sum = [&] {
      const std::uint64_t keys = matrix_descriptor(uniform(keys_at(last)));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        wgmma_m64n64k16<S, Major::mn>(dq[0], rounded[k], advance_descriptor(keys, k * 16 * kHeadRowBytes));
      wgmma_commit_group();
    };
    const auto step = [&](int tile, auto starts) {
      constexpr int kPending = starts ? 0 : 1;  // wgmma groups of the tile before, beside this tile's
      const std::uint64_t keys = matrix_descriptor(uniform(keys_at(key.stage))),
                          values = advance_descriptor(keys, Tiles::kTileBytes);
      key_pipeline.wait(key);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadWidth / 16; ++k)
        wgmma_m64n128k16<S>(p[0], advance_descriptor(own_rows, k * 32), advance_descriptor(keys, k * 32), k > 0);
      wgmma_commit_group();
#pragma unroll
      for (int k = 0; k < kHeadWidth / 16; ++k)
        wgmma_m64n128k16<S>(ds[0], advance_descriptor(own_d_o, k * 32), advance_descriptor(values, k * 32), k > 0);
      wgmma_commit_group();
      if constexpr (!starts) begin_sum();
      wgmma_wait_group<1 + kPending>();
      fence_operand(p[0]);
      causal_mask<false, 1, kKeys>(p, warp_position, tile * kKeys, copysignf(INFINITY, -scale));
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[0][n][i] = exp2_approximate(fmaf(p[0][n][i], scale, -lse[i / 2]));
      if (a.T < 0) {  // keep_live: ptxas else sinks the exponentials below the wait
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) keep_live(p[0][n], queries);
      }
      wgmma_wait_group<kPending>();
      fence_operand(ds[0]);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - delta[i / 2]);
      if constexpr (!starts) {
        wgmma_wait_group<0>();
        fence_operand(dq[0]);
        if (elected) key_pipeline.release(last);
      }
      round_fragments<S, kKeys>(rounded, ds[0]);
      last = key.stage;
      key_pipeline.advance(key);
    };
    if (tiles > 0) {
      step(0, std::true_type{});
      for (int tile = 1; tile < tiles; ++tile) step(tile, std::false_type{});
      begin_sum();
      wgmma_wait_group<0>();
      fence_operand(dq[0]);
      if (elected) key_pipeline.release(last);
    }
    for (int tile = tiles; tile < at.tiles; ++tile, key_pipeline.advance(key)) {  // that only later queries see
      key_pipeline.wait(key);
      if (elected) key_pipeline.release(key.stage);
    }

    const auto query_at = [&](int n, int half_row) {
      return unpack<S>(*reinterpret_cast<const unsigned*>(warp_rows + Rows::offset(lane_row(2 * half_row), n) +
                                                          lane_column(0) * sizeof(S)));
    };
    float dots[2];
    row_dots(dots, dq[0], query_at);
    float dgain = dots[0] + dots[1];
#pragma unroll
    for (int offset = kWarp / 2; offset >= 4; offset /= 2) dgain += __shfl_xor_sync(0xffffffffu, dgain, offset);
    if (past_norms) {
      cp_async_wait_all();
      __syncwarp();
      const RopeOrder order = g.norms.order;
      order.exchange_rows<kHeadWidth / 8>(dq[0]);
      rows_backward(dq[0], dots, angles, factors,
                    [&](int n, int half_row) { return query_at(order(n, kHeadWidth / 16), half_row); });
      fence_proxy_async_shared();
    } else {
#pragma unroll
      for (int n = 0; n < kHeadWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[0][n][i] *= gain * a.root;
    }
    __syncwarp();
    query_pipeline.release_warp(query.stage);
    query_pipeline.advance(query);
    if (tiles == 0) continue;
    if (elected && warp_query < a.queries)
      g.dgain[(i64{at.h} * a.batch + at.b) * gain_rows + warp_query / Tiles::kGainRows] = a.root * dgain;
    store_rows<S, kHeadWidth, 1>(own_tile, dq, g.head(a, at.b, at.h), g.stride(a), warp_position, a.T, a.D,
                                 [&](int n) { return g.norms.order(n, kHeadWidth / 16); });
    __syncwarp();  // the tile is free for the next rows
  }
}

struct DkdvTiles {
  static constexpr int kQueries = QueryRows::kQueries, kOwnKeys = 64;
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup,
                       kWarps = kConsumers * kWarpgroup / kWarp;
  static constexpr int kKeys = kConsumers * kOwnKeys, kKeyBytes = kKeys * kHeadRowBytes;
  static constexpr int kTileBytes = kQueries * kHeadRowBytes, kStages = 4;  // a stage: queries, dO, their numbers
  static constexpr int kWarpTile = SharedTile<kHeadWidth>::bytes(16);
  static constexpr int kSlots = 2 * kKeyBytes, kTiles = kSlots + 2 * kStages * kTileBytes;
  static constexpr int kAngles = kTiles + kWarps * kWarpTile;  // two tiles of each warp
  static constexpr int kRows = kAngles + 2 * kWarps * kWarpTile, kBarriers = kRows + kStages * QueryRows::kBytes;
  using Queries = Pipeline<kStages>;
  using Keys = Pipeline<1>;
  static constexpr int kSharedBytes = kSwizzleBytes + kBarriers + Queries::kBarrierBytes + Keys::kBarrierBytes;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
};

template <class S>
__global__ void __launch_bounds__(DkdvTiles::kThreads, 1)
    attention_dkdv(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap d_o_map,
                   const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                   const AttentionArgs<S> a, const AttentionGradArgs<S> g, const TileScheduler order) {
  using Tiles = DkdvTiles;
  constexpr int kQueries = Tiles::kQueries;
  extern __shared__ unsigned char raw[];
  unsigned char* const shared = align_shared(raw);
  const unsigned keys = shared_address(shared), slots = keys + Tiles::kSlots;
  const Tiles::Queries query_pipeline{keys + Tiles::kBarriers};
  const Tiles::Keys key_pipeline{query_pipeline.barriers + Tiles::Queries::kBarrierBytes};
  const auto queries_at = [&](int stage) { return slots + 2 * stage * Tiles::kTileBytes; };
  if (threadIdx.x == 0) {
    query_pipeline.init(Tiles::kWarps * kWarpArrivals);
    key_pipeline.init(Tiles::kWarps * kWarpArrivals);
    mbarrier_init_fence();
  }
  __syncthreads();

  const unsigned blocks = static_cast<unsigned>(order.heads) * static_cast<unsigned>(order.tiles);
  const int warpgroup = static_cast<int>(uniform(threadIdx.x / kWarpgroup)),
            query_tiles = static_cast<int>(QueryRows::tiles(a.queries));
  // What a block has to do: keys [first_key, first_key + kKeys) of one head, and the queries from first_tile on.
  struct KeyTile {
    int b, kv, first_key, first_tile;
    __device__ KeyTile(const AttentionArgs<S>& a, const TileScheduler::Place& place)
        : b(place.head / a.K),
          kv(place.head % a.K),
          first_key(place.rank * Tiles::kKeys),
          first_tile(max(0, first_key - a.first()) / kQueries) {}
  };
  if (warpgroup == Tiles::kConsumers) {
    warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
    if (threadIdx.x != Tiles::kConsumers * kWarpgroup) return;
    PipelineState query = PipelineState::of_producer(), key = PipelineState::of_producer();
    for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, key_pipeline.advance(key)) {
      const KeyTile at(a, order.at(block));
      const unsigned keys_full = key_pipeline.acquire(key, 2 * Tiles::kKeyBytes);
      tma_load(keys, &k_map, at.kv * kHeadWidth, at.first_key, at.b, keys_full);
      tma_load(keys + Tiles::kKeyBytes, &v_map, at.kv * kHeadWidth, at.first_key, at.b, keys_full);
      for (int h = at.kv * a.group(); h < (at.kv + 1) * a.group(); ++h)
        for (int tile = at.first_tile; tile < query_tiles; ++tile, query_pipeline.advance(query)) {
          const unsigned full = query_pipeline.acquire(query, 2 * Tiles::kTileBytes + QueryRows::kBytes);
          const unsigned to = queries_at(query.stage);
          tma_load(to, &q_map, h * kHeadWidth, tile * kQueries, at.b, full);
          tma_load(to + Tiles::kTileBytes, &d_o_map, h * kHeadWidth, tile * kQueries, at.b, full);
          tma_load_bulk(keys + Tiles::kRows + query.stage * QueryRows::kBytes,
                        g.delta + QueryRows::at(a, at.b, h, tile), QueryRows::kBytes, full);
        }
    }
    return;
  }

  warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp;
  unsigned char* const own_tile = shared + Tiles::kTiles + warp * Tiles::kWarpTile;
  PipelineState query = PipelineState::of_consumer(), key = PipelineState::of_consumer();
  for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, key_pipeline.advance(key)) {
    const KeyTile at(a, order.at(block));
    const int own_first = at.first_key + warpgroup * Tiles::kOwnKeys, warp_key = own_first + warp % 4 * 16;
    Fragments<1, kHeadWidth> k, v;
    key_pipeline.wait(key);
    __syncwarp();
    load_fragments<kHeadWidth, 1>(k, keys, warp * 16);
    load_fragments<kHeadWidth, 1>(v, keys + Tiles::kKeyBytes, warp * 16);
    __syncwarp();
    key_pipeline.release_warp(key.stage);
    unsigned char* const angle_tiles = shared + Tiles::kAngles + 2 * warp * Tiles::kWarpTile;
    const SharedAngles angles{angle_tiles, angle_tiles + Tiles::kWarpTile};
    float factors[2];
    if (g.norms.cos) {
      angles.begin(g.norms.cos, g.norms.sin, warp_key, a.T);
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const int row = min(warp_key + lane_row(2 * half_row), a.T - 1);
        factors[half_row] = a.root * g.norms.k_factors[(i64{at.b} * a.T + row) * a.K + at.kv];
      }
    }

    Accumulator<1, kHeadWidth> dk = {}, dv = {};
    Accumulator<1, kQueries> p, ds;
    int last = -1;  // the stage of the tile before, if wgmma may still read it
    for (int h = at.kv * a.group(); h < (at.kv + 1) * a.group(); ++h) {
      const float gain = a.gain[h], scale = softmax_scale_log2(gain, a.root);
      for (int tile = at.first_tile; tile < query_tiles; ++tile, query_pipeline.advance(query)) {
        const int position = a.first() + tile * kQueries;
        query_pipeline.wait(query);
        if (position + kQueries <= own_first) {  // they see none of these keys
          query_pipeline.release_warp(query.stage);
        } else {
          const std::uint64_t queries = matrix_descriptor(queries_at(query.stage)),
                              d_o = advance_descriptor(queries, Tiles::kTileBytes);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kHeadWidth / 16; ++i)
            wgmma_m64n64k16<S, Major::k>(p[0], k[0][i], advance_descriptor(queries, i * 32), i > 0);
          wgmma_commit_group();
#pragma unroll
          for (int i = 0; i < kHeadWidth / 16; ++i)
            wgmma_m64n64k16<S, Major::k>(ds[0], v[0][i], advance_descriptor(d_o, i * 32), i > 0);
          wgmma_commit_group();
          wgmma_wait_group<1>();  // and so are those of the tile before
          fence_operand(p[0]);
          if (last >= 0) query_pipeline.release_warp(last);
          causal_mask<true, 1, kQueries>(p, warp_key, position, copysignf(INFINITY, -scale));
          float4 rows[kQueries / 8];  // of this lane's queries, two by two
          const float* const own_rows =
              reinterpret_cast<const float*>(shared + Tiles::kRows + query.stage * QueryRows::kBytes) +
              2 * lane_column(0);
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n) {
            rows[n] = *reinterpret_cast<const float4*>(own_rows + 16 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              p[0][n][i] = exp2_approximate(fmaf(p[0][n][i], scale, i % 2 == 0 ? -rows[n].x : -rows[n].y));
          }
          unsigned rounded_p[kQueries / 16][4], rounded_ds[kQueries / 16][4];
          round_fragments<S, kQueries>(rounded_p, p[0]);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kQueries / 16; ++i)
            wgmma_m64n64k16<S, Major::mn>(dv[0], rounded_p[i], advance_descriptor(d_o, i * 16 * kHeadRowBytes));
          wgmma_commit_group();
          wgmma_wait_group<1>();
          fence_operand(ds[0]);
#pragma unroll
          for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
              ds[0][n][i] = p[0][n][i] * fmaf(ds[0][n][i], gain, i % 2 == 0 ? -rows[n].z : -rows[n].w);
          }
          __syncwarp();  // all lanes have read `rows`: the stage may be released after the GEMMs
          round_fragments<S, kQueries>(rounded_ds, ds[0]);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kQueries / 16; ++i)
            wgmma_m64n64k16<S, Major::mn>(dk[0], rounded_ds[i], advance_descriptor(queries, i * 16 * kHeadRowBytes));
          wgmma_commit_group();
          last = query.stage;
        }
        if (a.T < 0) {  // keep_live: ptxas else reuses the fragments' registers
#pragma unroll
          for (int i = 0; i < kHeadWidth / 16; ++i) {
            keep_live(k[0][i], keys);
            keep_live(v[0][i], keys);
          }
        }
      }
    }
    wgmma_wait_group<0>();
    fence_operand(dk[0]);
    fence_operand(dv[0]);
    if (last >= 0) query_pipeline.release_warp(last);

    if (g.norms.cos) {
      cp_async_wait_all();
      __syncwarp();
      const auto key_at = [&](int n, int half_row) { return unpack<S>(k[0][n / 2][n % 2 * 2 + half_row]); };
      float dots[2];
      row_dots(dots, dk[0], key_at);
      g.norms.order.exchange_rows<kHeadWidth / 8>(dk[0]);
      g.norms.order.exchange<kHeadWidth / 8>([&](int one, int other) {
#pragma unroll
        for (int half_row = 0; half_row < 2; ++half_row) {
          const unsigned was = k[0][one / 2][one % 2 * 2 + half_row];
          k[0][one / 2][one % 2 * 2 + half_row] = k[0][other / 2][other % 2 * 2 + half_row];
          k[0][other / 2][other % 2 * 2 + half_row] = was;
        }
      });
      rows_backward(dk[0], dots, angles, factors, key_at);
    } else {
#pragma unroll
      for (int n = 0; n < kHeadWidth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[0][n][i] *= a.root;
    }
    store_rows<S, kHeadWidth, 1>(own_tile, dk, g.head(a, at.b, a.H + at.kv), g.stride(a), warp_key, a.T, a.D,
                                 [&](int n) { return g.norms.order(n, kHeadWidth / 16); });
    __syncwarp();  // the rows before have left the tile
    store_rows<S, kHeadWidth, 1>(own_tile, dv, g.head(a, at.b, a.H + a.K + at.kv), g.stride(a), warp_key, a.T, a.D);
    __syncwarp();
  }
}

template <class S>
void launch_attention_backward(const CudaBackend& backend, const AttentionArgs<S>& a, const AttentionGradArgs<S>& g) {
  const i64 head_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(S);  // keys and values, or queries and dO
  const DType dtype = backend.dtype();
  const auto of_queries = [&](const S* x, int rows) {
    return tensor_map(x, dtype, a.batch, a.queries, a.H * a.D, rows);
  };
  const auto of_keys = [&](const S* x) { return tensor_map(x, dtype, a.batch, a.T, a.K * a.D, DqTiles::kKeys); };
  const auto blocks = [&](const TileScheduler& order) {
    return std::min(order.blocks(), static_cast<unsigned>(backend.sm_count()));
  };
  const TileScheduler by_query(a.batch * a.H, blocks_for(a.queries, DqTiles::kQueries), a.group(), head_bytes);
  launch("attention_dq", attention_dq<S>, blocks(by_query), DqTiles::kThreads, DqTiles::kSharedBytes, backend.stream(),
         of_queries(a.q, DqTiles::kQueries), of_queries(g.d_o, DqTiles::kQueries), of_queries(g.o, DqTiles::kQueries),
         of_keys(a.k), of_keys(a.v), a, g, by_query);
  const TileScheduler by_key(a.batch * a.K, blocks_for(a.T, DkdvTiles::kKeys), 1, head_bytes * a.group());
  static_assert(DkdvTiles::kKeys == DqTiles::kKeys);
  launch("attention_dkdv", attention_dkdv<S>, blocks(by_key), DkdvTiles::kThreads, DkdvTiles::kSharedBytes,
         backend.stream(), of_queries(a.q, DkdvTiles::kQueries), of_queries(g.d_o, DkdvTiles::kQueries), of_keys(a.k),
         of_keys(a.v), a, g, by_key);
}

}  // namespace pgolf::cuda::sm90
