// Attention forward on tensor cores (FlashAttention-2, Dao 2023): an online softmax over tiles of keys.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace pgolf::cuda {

template <int kWidth>
struct ForwardTiles {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kWidth <= 64 ? 2 : 1;  // a wider row leaves no registers for a second
  static constexpr int kWarpRows = 16 * kRowTiles, kQueries = kWarps * kWarpRows, kKeys = 64;
  static constexpr int kTileBytes = SharedTile<kWidth>::bytes(kKeys);
  static constexpr int kSlotBytes = 2 * kTileBytes;  // keys, values
  static constexpr int kSharedBytes = 2 * kSlotBytes;
  static constexpr int kBlocks = kRowTiles == 2 || kWidth > 96 ? 2 : 3;  // an SM, by registers
  // Queries come in and outputs go out through a slot.
  static_assert(SharedTile<kWidth>::bytes(kQueries) <= kSlotBytes && kSharedBytes <= kSharedOnEveryGpu);
};

template <class S, int kWidth>
__global__ void __launch_bounds__(ForwardTiles<kWidth>::kThreads, ForwardTiles<kWidth>::kBlocks)
    attention_forward(const AttentionArgs<S> a, const TileScheduler order) {
  using Tiles = ForwardTiles<kWidth>;
  constexpr int kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned slots = shared_address(shared);

  const TileScheduler::Place place = order.at(blockIdx.x);
  const int b = place.head / a.H, h = place.head % a.H, kv = h / a.group();
  const int first_query = (order.tiles - 1 - place.rank) * Tiles::kQueries;
  const int warp_row = threadIdx.x / kWarp * Tiles::kWarpRows, warp_query = first_query + warp_row;
  const int position = first_query + a.first(), warp_position = warp_query + a.first();  // of the first query
  const int q_stride = a.H * a.D, kv_stride = a.K * a.D;
  const S *keys = a.k + a.kv_head_at(b, kv), *values = a.v + a.kv_head_at(b, kv);
  const auto load = [&](int tile) {
    const unsigned slot = slots + tile % 2 * Tiles::kSlotBytes;
    load_tile<S, kWidth, kKeys, Tiles::kThreads>(slot, keys, kv_stride, tile * kKeys, a.T, a.D);
    load_tile<S, kWidth, kKeys, Tiles::kThreads>(slot + Tiles::kTileBytes, values, kv_stride, tile * kKeys, a.T, a.D);
  };
  load(0);
  load_tile<S, kWidth, Tiles::kQueries, Tiles::kThreads>(slots + Tiles::kSlotBytes, a.q + a.head_at(b, h), q_stride,
                                                         first_query, a.queries, a.D);

  // A negative scale flips the queries' signs, so that the greatest product is the greatest score.
  const float signed_scale = softmax_scale_log2(a.gain[h], a.root), scale = fabsf(signed_scale);
  cp_async_wait_all();
  __syncthreads();
  Fragments<kRowTiles, kWidth> q;
  load_fragments<kWidth, kRowTiles>(q, slots + Tiles::kSlotBytes, warp_row);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) q[r][k][i] ^= signed_scale < 0.0f ? kSignBits : 0;

  Accumulator<kRowTiles, kWidth> o = {};
  float row_max[kRowTiles][2], row_sum[kRowTiles][2] = {};  // row_sum: of this lane's columns
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) row_max[r][0] = row_max[r][1] = -INFINITY;

  const int tiles = (min(position + Tiles::kQueries, a.T) + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait_all();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
    const int first_key = tile * kKeys;
    if (first_key >= warp_position + Tiles::kWarpRows) continue;  // no row of this warp sees them
    const unsigned slot = slots + tile % 2 * Tiles::kSlotBytes;

    Accumulator<kRowTiles, kKeys> s;
    multiply_transposed<S, kWidth, kRowTiles, kKeys>(s, q, slot);
    causal_mask<false, kRowTiles, kKeys>(s, warp_position, first_key, -INFINITY);

    // The sums so far are rescaled to the new maximum, which soon stays what it is: then no rescaling by 1.
    float rescale[kRowTiles][2];
    bool same = true;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        float best = row_max[r][half_row];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) best = fmaxf(best, fmaxf(s[r][n][2 * half_row], s[r][n][2 * half_row + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        rescale[r][half_row] = exp2_approximate((row_max[r][half_row] - best) * scale);
        same = same && row_max[r][half_row] == best;
        row_max[r][half_row] = best;
      }
    if (!__all_sync(0xffffffffu, same)) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        row_sum[r][0] *= rescale[r][0];
        row_sum[r][1] *= rescale[r][1];
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[r][n][i] *= rescale[r][i / 2];
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[r][n][i] = exp2_approximate(fmaf(s[r][n][i], scale, -row_max[r][i / 2] * scale));
          row_sum[r][i / 2] += s[r][n][i];
        }
    multiply_accumulate<S, kWidth, kRowTiles, kKeys>(o, s, slot + Tiles::kTileBytes);
  }

  finalize_softmax<kRowTiles, kWidth>(o, row_max, row_sum, scale, a.lse + a.row_at(b, h), warp_query, a.queries);
  __syncthreads();  // no warp reads keys or values any more
  store_rows<S, kWidth, kRowTiles>(shared + SharedTile<kWidth>::bytes(warp_row), o, a.o + a.head_at(b, h), q_stride,
                                   warp_query, a.queries, a.D);
}

template <class S>
void AttentionKernels<S>::forward(const AttentionArgs<S>& a, cudaStream_t stream) {
  with_width(a.D, [&](auto width) {
    using Tiles = ForwardTiles<width()>;
    const i64 key_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(S);
    const TileScheduler order(a.batch * a.H, blocks_for(a.queries, Tiles::kQueries), a.group(), key_bytes);
    launch("attention_forward", attention_forward<S, width()>, order.blocks(), Tiles::kThreads, Tiles::kSharedBytes,
           stream, a, order);
  });
}

}  // namespace pgolf::cuda
