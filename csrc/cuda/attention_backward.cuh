// Attention backward on tensor cores, in two kernels without atomics: dq by tiles of queries, dk and dv by tiles of
// keys. Both recompute scores and probabilities: 7 GEMMs for the 5 that are counted, and the same bits every time.
//   p = softmax(s), dp = dO·vᵀ, ds = p⊙(dp − Σ dO⊙O)
//   dv = pᵀ·dO, dk = gain/√D·dsᵀ·q, dq = gain/√D·ds·k, dgain = 1/√D·Σ (ds·k)⊙q
#pragma once

#include "cuda/attention_tiles.cuh"

namespace pgolf::cuda {

template <int kWidth>
struct DqTiles {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kWidth <= 64 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kQueries = kWarps * kWarpRows;
  static constexpr int kKeys = kWidth < 128 ? 64 : 32;  // of a tile
  static constexpr int kStep = 32;                      // keys whose scores are in registers at a time
  static constexpr int kTileBytes = SharedTile<kWidth>::bytes(kKeys);
  static constexpr int kSlotBytes = 2 * kTileBytes;  // keys, values
  static constexpr int kRowBytes = SharedTile<kWidth>::bytes(kQueries);
  // Queries and dO come in where the second slot is, and beyond.
  static constexpr int kDeltas = kSlotBytes + std::max(kSlotBytes, 2 * kRowBytes);
  static constexpr int kSharedBytes = kDeltas + kQueries * static_cast<int>(sizeof(float));
  static constexpr int kBlocks = 2;  // an SM, by registers
  static_assert(kSharedBytes <= kSharedOnEveryGpu);
};

template <class S, int kWidth>
__global__ void __launch_bounds__(DqTiles<kWidth>::kThreads, DqTiles<kWidth>::kBlocks)
    attention_dq(const AttentionArgs<S> a, const AttentionGradArgs<S> g, const TileScheduler order) {
  using Tiles = DqTiles<kWidth>;
  constexpr int kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys, kStep = Tiles::kStep;
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned slots = shared_address(shared), rows = slots + Tiles::kSlotBytes;
  float* deltas = reinterpret_cast<float*>(shared + Tiles::kDeltas);

  const TileScheduler::Place place = order.at(blockIdx.x);
  const int b = place.head / a.H, h = place.head % a.H, kv = h / a.group();
  const int query_tile = order.tiles - 1 - place.rank, first_query = query_tile * Tiles::kQueries;
  const int warp_row = threadIdx.x / kWarp * Tiles::kWarpRows, warp_query = first_query + warp_row;
  const int q_stride = a.H * a.D, kv_stride = a.K * a.D;
  const i64 head = a.head_at(b, h), head_row = a.row_at(b, h);
  const S *keys = a.k + a.kv_head_at(b, kv), *values = a.v + a.kv_head_at(b, kv);
  const auto load = [&](int tile) {
    const unsigned slot = slots + tile % 2 * Tiles::kSlotBytes;
    load_tile<S, kWidth, kKeys, Tiles::kThreads>(slot, keys, kv_stride, tile * kKeys, a.T, a.D);
    load_tile<S, kWidth, kKeys, Tiles::kThreads>(slot + Tiles::kTileBytes, values, kv_stride, tile * kKeys, a.T, a.D);
  };
  load_tile<S, kWidth, Tiles::kQueries, Tiles::kThreads>(rows, a.q + head, q_stride, first_query, a.T, a.D);
  load_tile<S, kWidth, Tiles::kQueries, Tiles::kThreads>(rows + Tiles::kRowBytes, g.d_o + head, q_stride, first_query,
                                                         a.T, a.D);
  load(0);

  const float gain = a.gain[h], scale = softmax_scale_log2(gain, a.root);
  constexpr int kLanes = 8;  // on a row's delta
#pragma unroll 4
  for (int row = threadIdx.x / kLanes; row < Tiles::kQueries; row += Tiles::kThreads / kLanes) {
    const int query = first_query + row;
    float sum = 0.0f;
    if (query < a.T)
      for (int i = threadIdx.x % kLanes * kVector; i < a.D; i += kLanes * kVector) {
        const i64 at = head + (query * q_stride + i);
        const Vector8 o = load8(g.o + at), d_o = load8(g.d_o + at);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum = fmaf(o.x[j], d_o.x[j], sum);
      }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % kLanes == 0) {
      deltas[row] = sum;
      if (query < a.T) g.delta[head_row + query] = gain * sum;
    }
  }
  cp_async_wait_all();
  __syncthreads();

  Fragments<kRowTiles, kWidth> q, d_o;
  load_fragments<kWidth, kRowTiles>(q, rows, warp_row);
  load_fragments<kWidth, kRowTiles>(d_o, rows + Tiles::kRowBytes, warp_row);
  float lse[kRowTiles][2], delta[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const int row = warp_row + 16 * r + lane_row(2 * half_row);
      delta[r][half_row] = deltas[row];
      lse[r][half_row] = first_query + row < a.T ? a.lse[head_row + first_query + row] : 0.0f;
    }

  Accumulator<kRowTiles, kWidth> sum = {};
  const int tiles = (min(first_query + Tiles::kQueries, a.T) + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait_all();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
#pragma unroll 1
    for (int step = 0; step < kKeys; step += kStep) {
      const int first_key = tile * kKeys + step;
      if (first_key >= warp_query + Tiles::kWarpRows) break;  // no row of this warp sees them
      const unsigned key_rows = slots + tile % 2 * Tiles::kSlotBytes + SharedTile<kWidth>::bytes(step);
      Accumulator<kRowTiles, kStep> p, ds;
      multiply_transposed<S, kWidth, kRowTiles, kStep>(p, q, key_rows);
      causal_mask<false, kRowTiles, kStep>(p, warp_query, first_key, copysignf(INFINITY, -scale));
      multiply_transposed<S, kWidth, kRowTiles, kStep>(ds, d_o, key_rows + Tiles::kTileBytes);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            p[r][n][i] = exp2_approximate(fmaf(p[r][n][i], scale, -lse[r][i / 2]));
            ds[r][n][i] = p[r][n][i] * (ds[r][n][i] - delta[r][i / 2]);
          }
      multiply_accumulate<S, kWidth, kRowTiles, kStep>(sum, ds, key_rows);
    }
  }

  float dgain = 0.0f;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 query = unpack<S>(q[r][n / 2][n % 2 * 2 + i / 2]);  // where the sum lies, the fragment lies too
        dgain = fmaf(sum[r][n][i], query.x, dgain);
        dgain = fmaf(sum[r][n][i + 1], query.y, dgain);
        sum[r][n][i] *= gain * a.root;
        sum[r][n][i + 1] *= gain * a.root;
      }
  __syncthreads();  // no warp reads keys, values or deltas any more
  dgain = block_sum(dgain, deltas);
  if (threadIdx.x == 0) g.dgain[(static_cast<i64>(h) * a.batch + b) * order.tiles + query_tile] = a.root * dgain;
  store_rows<S, kWidth, kRowTiles>(shared + SharedTile<kWidth>::bytes(warp_row), sum, g.head(a, b, h), g.stride(a),
                                   warp_query, a.T, a.D);
}

template <int kWidth>
struct DkdvTiles {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kWidth <= 64 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles, kKeys = kWarps * kWarpRows;
  static constexpr int kQueries = kWidth < 128 ? 64 : 32;  // of a tile
  static constexpr int kStep = 16;                         // queries whose scores are in registers at a time
  static constexpr int kTileBytes = SharedTile<kWidth>::bytes(kQueries);
  static constexpr int kLse = 2 * kTileBytes, kDelta = kLse + kQueries * static_cast<int>(sizeof(float));
  static constexpr int kSlotBytes = kDelta + kQueries * static_cast<int>(sizeof(float));  // queries, dO, lse, delta
  static constexpr int kRowBytes = SharedTile<kWidth>::bytes(kKeys);
  // Keys and values come in where the second slot is, and beyond.
  static constexpr int kSharedBytes = kSlotBytes + std::max(kSlotBytes, 2 * kRowBytes);
  static constexpr int kBlocks = 2;         // an SM, by registers
  static_assert(2 * kQueries <= kThreads);  // each thread copies at most one lse or delta
  static_assert(kSharedBytes <= kSharedOnEveryGpu);
};

template <class S, int kWidth>
__global__ void __launch_bounds__(DkdvTiles<kWidth>::kThreads, DkdvTiles<kWidth>::kBlocks)
    attention_dkdv(const AttentionArgs<S> a, const AttentionGradArgs<S> g, const TileScheduler order) {
  using Tiles = DkdvTiles<kWidth>;
  constexpr int kRowTiles = Tiles::kRowTiles, kQueries = Tiles::kQueries, kStep = Tiles::kStep;
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned slots = shared_address(shared), rows = slots + Tiles::kSlotBytes;

  const TileScheduler::Place place = order.at(blockIdx.x);
  const int b = place.head / a.K, kv = place.head % a.K, first_key = place.rank * Tiles::kKeys;
  const int warp_row = threadIdx.x / kWarp * Tiles::kWarpRows, warp_key = first_key + warp_row;
  const int q_stride = a.H * a.D, kv_stride = a.K * a.D;
  const int first_tile = first_key / kQueries, tiles = (a.T + kQueries - 1) / kQueries;
  const int first_head = kv * a.group();
  const i64 kv_head = a.kv_head_at(b, kv), head = a.head_at(b, first_head), head_row = a.row_at(b, first_head);
  const auto load = [&](int h, int tile, unsigned slot) {  // h: 0 … group − 1
    const int first_query = tile * kQueries;
    load_tile<S, kWidth, kQueries, Tiles::kThreads>(slot, a.q + head + h * a.D, q_stride, first_query, a.T, a.D);
    load_tile<S, kWidth, kQueries, Tiles::kThreads>(slot + Tiles::kTileBytes, g.d_o + head + h * a.D, q_stride,
                                                    first_query, a.T, a.D);
    // Queries from T on have lse = delta = 0, and as dO is 0 there too they add nothing.
    if (threadIdx.x < 2 * kQueries) {
      const int query = first_query + threadIdx.x % kQueries;
      const float* from = (threadIdx.x < kQueries ? a.lse : g.delta) + head_row + (h * a.T + query);
      cp_async_4(slot + Tiles::kLse + threadIdx.x * sizeof(float), from, query < a.T);
    }
  };
  load_tile<S, kWidth, Tiles::kKeys, Tiles::kThreads>(rows, a.k + kv_head, kv_stride, first_key, a.T, a.D);
  load_tile<S, kWidth, Tiles::kKeys, Tiles::kThreads>(rows + Tiles::kRowBytes, a.v + kv_head, kv_stride, first_key, a.T,
                                                      a.D);
  load(0, first_tile, slots);
  cp_async_wait_all();
  __syncthreads();
  Fragments<kRowTiles, kWidth> k, v;
  load_fragments<kWidth, kRowTiles>(k, rows, warp_row);
  load_fragments<kWidth, kRowTiles>(v, rows + Tiles::kRowBytes, warp_row);

  Accumulator<kRowTiles, kWidth> dk = {}, dv = {};
  for (int h = 0, tile = first_tile, slot = 0; h < a.group(); slot ^= 1) {
    cp_async_wait_all();
    __syncthreads();
    const bool last_tile = tile + 1 == tiles;
    const int next_h = last_tile ? h + 1 : h, next_tile = last_tile ? first_tile : tile + 1;
    if (next_h < a.group()) load(next_h, next_tile, slots + (slot ^ 1) * Tiles::kSlotBytes);

    const float gain = a.gain[first_head + h], scale = softmax_scale_log2(gain, a.root);
#pragma unroll 1
    for (int step = 0; step < kQueries; step += kStep) {
      const int first_query = tile * kQueries + step;
      if (first_query + kStep <= warp_key) continue;  // they see no row of this warp
      const int slot_at = slot * Tiles::kSlotBytes, step_at = SharedTile<kWidth>::bytes(step);
      const unsigned query_rows = slots + slot_at + step_at, d_o_rows = query_rows + Tiles::kTileBytes;
      const float* lses = reinterpret_cast<const float*>(shared + slot_at + Tiles::kLse) + step;
      const float* deltas = reinterpret_cast<const float*>(shared + slot_at + Tiles::kDelta) + step;
      Accumulator<kRowTiles, kStep> p, ds;
      multiply_transposed<S, kWidth, kRowTiles, kStep>(p, k, query_rows);
      causal_mask<true, kRowTiles, kStep>(p, warp_key, first_query, copysignf(INFINITY, -scale));
      multiply_transposed<S, kWidth, kRowTiles, kStep>(ds, v, d_o_rows);
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
        const float2 lse = *reinterpret_cast<const float2*>(lses + 8 * n + lane_column(0));
        const float2 delta = *reinterpret_cast<const float2*>(deltas + 8 * n + lane_column(0));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            p[r][n][i] = exp2_approximate(fmaf(p[r][n][i], scale, i % 2 == 0 ? -lse.x : -lse.y));
            ds[r][n][i] = p[r][n][i] * fmaf(ds[r][n][i], gain, i % 2 == 0 ? -delta.x : -delta.y);
          }
      }
      multiply_accumulate<S, kWidth, kRowTiles, kStep>(dv, p, d_o_rows);
      multiply_accumulate<S, kWidth, kRowTiles, kStep>(dk, ds, query_rows);
    }
    h = next_h;
    tile = next_tile;
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[r][n][i] *= a.root;
  __syncthreads();  // no warp reads queries or dO any more
  unsigned char* out = shared + SharedTile<kWidth>::bytes(warp_row);
  store_rows<S, kWidth, kRowTiles>(out, dk, g.head(a, b, a.H + kv), g.stride(a), warp_key, a.T, a.D);
  store_rows<S, kWidth, kRowTiles>(out + Tiles::kRowBytes, dv, g.head(a, b, a.H + a.K + kv), g.stride(a), warp_key, a.T,
                                   a.D);
}

template <class S>
int AttentionKernels<S>::dq_rows(int D) {
  return with_width(D, [](auto width) { return DqTiles<width()>::kQueries; });
}

template <class S>
void AttentionKernels<S>::backward(const AttentionArgs<S>& a, const AttentionGradArgs<S>& g, cudaStream_t stream) {
  with_width(a.D, [&](auto width) {
    const i64 head_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(S);  // keys and values, or queries and dO
    using Dq = DqTiles<width()>;
    const TileScheduler by_query(a.batch * a.H, blocks_for(a.T, Dq::kQueries), a.group(), head_bytes);
    launch("attention_dq", attention_dq<S, width()>, by_query.blocks(), Dq::kThreads, Dq::kSharedBytes, stream, a, g,
           by_query);
    using Dkdv = DkdvTiles<width()>;
    const TileScheduler by_key(a.batch * a.K, blocks_for(a.T, Dkdv::kKeys), 1, head_bytes * a.group());
    launch("attention_dkdv", attention_dkdv<S, width()>, by_key.blocks(), Dkdv::kThreads, Dkdv::kSharedBytes, stream, a,
           g, by_key);
  });
}

}  // namespace pgolf::cuda
