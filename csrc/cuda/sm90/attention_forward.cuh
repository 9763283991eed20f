// Attention forward on Hopper's tensor cores for heads of 64 numbers (FlashAttention-3, Shah et al. 2024): three
// warpgroups of 64 queries each, past which one warp streams keys and values by the copy engine. While a warpgroup
// takes the softmax of one tile's scores, the products of the next scores and of the last probabilities run, and those
// of the other warpgroups. Blocks stay, one on each multiprocessor, so that the first copies of a tile of queries hide
// behind the end of the one before.
#pragma once

#include "cuda/sm90/attention_tiles.cuh"

namespace pgolf::cuda::sm90 {

struct ForwardTiles {
  static constexpr int kWidth = kHeadWidth, kKeys = 128;
  static constexpr int kConsumers = 3, kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kOwnQueries = 64, kQueries = kConsumers * kOwnQueries;  // of a warpgroup, of a block
  static constexpr int kStages = 3;
  static constexpr int kRowBytes = kWidth * 2, kTileBytes = kKeys * kRowBytes, kQueryBytes = kQueries * kRowBytes;
  static constexpr int kWarpTile = SharedTile<kWidth>::bytes(16), kWarps = kConsumers * kWarpgroup / kWarp;
  static constexpr int kTiles = kQueryBytes + 2 * kStages * kTileBytes;
  static constexpr int kBarriers = kTiles + kWarps * kWarpTile;
  using Queries = Pipeline<1>;
  using Rows = Pipeline<kStages>;  // of keys, and of values
  static constexpr int kSharedBytes = kSwizzleBytes + kBarriers + Queries::kBarrierBytes + 2 * Rows::kBarrierBytes;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
};

template <class S>
__global__ void __launch_bounds__(ForwardTiles::kThreads, 1)
    attention_forward(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const AttentionArgs<S> a, const BlockOrder order) {
  using Tiles = ForwardTiles;
  constexpr int kWidth = Tiles::kWidth, kKeys = Tiles::kKeys;
  extern __shared__ unsigned char raw[];
  unsigned char* const shared = align_shared(raw);
  const unsigned queries = shared_address(shared), slots = queries + Tiles::kQueryBytes;
  const Tiles::Queries query_pipeline{queries + Tiles::kBarriers};
  const Tiles::Rows key_pipeline{query_pipeline.barriers + Tiles::Queries::kBarrierBytes};
  const Tiles::Rows value_pipeline{key_pipeline.barriers + Tiles::Rows::kBarrierBytes};
  const auto keys_at = [&](int stage) { return slots + 2 * stage * Tiles::kTileBytes; };
  const auto values_at = [&](int stage) { return keys_at(stage) + Tiles::kTileBytes; };
  if (threadIdx.x == 0) {
    query_pipeline.init(Tiles::kWarps);
    key_pipeline.init(Tiles::kWarps);
    value_pipeline.init(Tiles::kWarps);
    barriers_ready();
  }
  __syncthreads();

  const unsigned blocks = static_cast<unsigned>(order.heads) * static_cast<unsigned>(order.tiles);
  const int warpgroup = static_cast<int>(uniform(threadIdx.x / kWarpgroup));
  if (warpgroup == Tiles::kConsumers) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x != Tiles::kConsumers * kWarpgroup) return;
    PipelineState rows = PipelineState::of_producer(), query = PipelineState::of_producer();
    for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, query_pipeline.advance(query)) {
      const QueryTile<Tiles> at(a, order, block);
      const unsigned queries_full = query_pipeline.acquire(query, Tiles::kQueryBytes);
      copy_box(queries, &q_map, at.h * kWidth, at.first_query, at.b, queries_full);
      for (int tile = 0; tile < at.tiles; ++tile, key_pipeline.advance(rows)) {
        const unsigned keys_full = key_pipeline.acquire(rows, Tiles::kTileBytes);
        copy_box(keys_at(rows.stage), &k_map, at.kv * kWidth, tile * kKeys, at.b, keys_full);
        const unsigned values_full = value_pipeline.acquire(rows, Tiles::kTileBytes);
        copy_box(values_at(rows.stage), &v_map, at.kv * kWidth, tile * kKeys, at.b, values_full);
      }
    }
    return;
  }

  take_registers<Tiles::kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp;
  const bool signals = threadIdx.x % kWarp == 0;
  unsigned char* const own_tile = shared + Tiles::kTiles + warp * Tiles::kWarpTile;
  const unsigned own_queries = queries + warpgroup * Tiles::kOwnQueries * Tiles::kRowBytes;
  PipelineState rows = PipelineState::of_consumer(), query = PipelineState::of_consumer();
  for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, query_pipeline.advance(query)) {
    const QueryTile<Tiles> at(a, order, block);
    const int own_first = at.first_query + warpgroup * Tiles::kOwnQueries;
    const int warp_query = own_first + warp % 4 * 16, warp_position = warp_query + a.first();
    const int tiles = own_first < a.queries ? at.tiles_until(a, own_first + Tiles::kOwnQueries) : 0;
    // A negative scale turns the products' signs, so that the greatest product is the greatest score.
    const float signed_scale = exponent_scale(a.gain[at.h], a.root), scale = fabsf(signed_scale);

    // Scores that have a bound need no running maximum: that of the first tile will do, if what may be above it by
    // twice the bound has room, as it has in bf16: probabilities reach 2^100, and sums with values T·max|v| times that.
    constexpr float kBound = 1.01f * kWidth, kMostExponent = 50.0f;
    const bool bounded = std::is_same_v<S, bf16> && a.normed && kBound * scale <= kMostExponent;

    Scores<1, kKeys> s;
    Scores<1, kWidth> o = {};
    unsigned p[kKeys / 16][4];  // the probabilities of the tile before
    float top[1][2] = {{-INFINITY, -INFINITY}}, sum[1][2] = {}, shrink[2];
    const auto begin_scores = [&](int from) {
      const std::uint64_t own_rows = descriptor(own_queries), keys = descriptor(keys_at(from));
      products_begin();
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k)
        multiply_add_64x128<S>(s[0], behind(own_rows, k * 32), behind(keys, k * 32), k > 0);
      products_commit();
    };
    const auto begin_outputs = [&](int from) {
      const std::uint64_t values = descriptor(values_at(from));
      products_begin();
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        multiply_add_64x64<S, Second::plain>(o[0], p[k], behind(values, k * 16 * Tiles::kRowBytes));
      products_commit();
    };
    // s becomes probabilities under the new maximum; shrink is what brings sums so far to it.
    const auto softmax = [&](int tile) {
      if (signed_scale < 0.0f) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[0][n][i] = -s[0][n][i];
      }
      hide_later_keys<false, 1, kKeys>(s, warp_position, tile * kKeys, -INFINITY);
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        float best = top[0][half_row];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) best = fmaxf(best, fmaxf(s[0][n][2 * half_row], s[0][n][2 * half_row + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        shrink[half_row] = exp2_approximate((top[0][half_row] - best) * scale);
        top[0][half_row] = best;
        sum[0][half_row] *= shrink[half_row];
        const float shift = best * scale;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half_row; i < 2 * half_row + 2; ++i) {
            s[0][n][i] = exp2_approximate(fmaf(s[0][n][i], scale, -shift));
            sum[0][half_row] += s[0][n][i];
          }
      }
    };
    // The same under the maximum that there is.
    const auto softmax_again = [&](int tile) {
      hide_later_keys<false, 1, kKeys>(s, warp_position, tile * kKeys, copysignf(INFINITY, -signed_scale));
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const float shift = top[0][half_row] * scale;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half_row; i < 2 * half_row + 2; ++i) {
            s[0][n][i] = exp2_approximate(fmaf(s[0][n][i], signed_scale, -shift));
            sum[0][half_row] += s[0][n][i];
          }
      }
    };
    query_pipeline.wait(query);
    int last = 0;  // the stage of the probabilities
    for (int tile = 0; tile < tiles; ++tile) {
      const bool again = uniform(bounded && tile > 0);
      key_pipeline.wait(rows);
      begin_scores(rows.stage);
      if (tile > 0) {
        value_pipeline.wait(last, rows.phase_before());
        begin_outputs(last);
        products_wait<1>();
      } else {
        products_wait<0>();
      }
      products_done(s[0]);
      if (signals) key_pipeline.release(rows.stage);
      if (signals && tile == tiles - 1) query_pipeline.release(query.stage);
      if (again)
        softmax_again(tile);
      else
        softmax(tile);
      if (a.T < 0) {  // the exponentials are not put off until after the wait
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) keep(s[0][n], queries);
      }
      products_wait<0>();
      products_done(o[0]);
      if (signals && tile > 0) value_pipeline.release(last);
      if (!again) {
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[0][n][i] *= shrink[i / 2];
      }
      round_fragments<S, kKeys>(p, s[0]);
      last = rows.stage;
      key_pipeline.advance(rows);
    }
    if (tiles > 0) {
      value_pipeline.wait(last, rows.phase_before());
      begin_outputs(last);
      products_wait<0>();
      products_done(o[0]);
      if (signals) value_pipeline.release(last);
    } else if (signals) {
      query_pipeline.release(query.stage);
    }
    for (int tile = tiles; tile < at.tiles; ++tile, key_pipeline.advance(rows)) {  // that only later queries see
      key_pipeline.wait(rows);
      if (signals) key_pipeline.release(rows.stage);
      value_pipeline.wait(rows);
      if (signals) value_pipeline.release(rows.stage);
    }
    if (tiles == 0) continue;

    finish_softmax<1, kWidth>(o, top, sum, scale, a.lse + a.row_at(at.b, at.h), warp_query, a.queries);
    __syncwarp();  // the rows before have left the tile
    store_rows<S, kWidth, 1>(own_tile, o, a.o + a.head_at(at.b, at.h), a.H * a.D, warp_query, a.queries, a.D);
  }
}

template <class S>
void launch_attention_forward(const CudaBackend& backend, const AttentionArgs<S>& a) {
  using Tiles = ForwardTiles;
  const i64 key_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(S);
  const BlockOrder order(a.batch * a.H, blocks_for(a.queries, Tiles::kQueries), a.group(), key_bytes);
  const DType dtype = backend.dtype();
  const unsigned blocks = std::min(order.blocks(), static_cast<unsigned>(backend.processors()));
  launch("attention_forward", attention_forward<S>, blocks, Tiles::kThreads, Tiles::kSharedBytes, backend.stream(),
         tensor_map(a.q, dtype, a.batch, a.queries, a.H * a.D, Tiles::kQueries),
         tensor_map(a.k, dtype, a.batch, a.T, a.K * a.D, Tiles::kKeys),
         tensor_map(a.v, dtype, a.batch, a.T, a.K * a.D, Tiles::kKeys), a, order);
}

}  // namespace pgolf::cuda::sm90
