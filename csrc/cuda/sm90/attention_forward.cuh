// Attention forward by wgmma for heads of 64 numbers (FlashAttention-3, Shah et al. 2024): three consumer warpgroups of
// 64 queries each, and a producer warp that streams keys and values to them by TMA. While a warpgroup takes the softmax
// of one tile, the GEMMs of the next tile's scores and of the last tile's outputs run, and those of the other
// warpgroups. The kernel is persistent, a block an SM, so that the first loads of a tile of queries overlap the end of
// the tile before.
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
                      const __grid_constant__ CUtensorMap v_map, const AttentionArgs<S> a, const TileScheduler order) {
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
    mbarrier_init_fence();
  }
  __syncthreads();

  const unsigned blocks = static_cast<unsigned>(order.heads) * static_cast<unsigned>(order.tiles);
  const int warpgroup = static_cast<int>(uniform(threadIdx.x / kWarpgroup));
  if (warpgroup == Tiles::kConsumers) {
    warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
    if (threadIdx.x != Tiles::kConsumers * kWarpgroup) return;
    PipelineState rows = PipelineState::of_producer(), query = PipelineState::of_producer();
    for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, query_pipeline.advance(query)) {
      const QueryTile<Tiles> at(a, order, block);
      const unsigned queries_full = query_pipeline.acquire(query, Tiles::kQueryBytes);
      tma_load(queries, &q_map, at.h * kWidth, at.first_query, at.b, queries_full);
      for (int tile = 0; tile < at.tiles; ++tile, key_pipeline.advance(rows)) {
        const unsigned keys_full = key_pipeline.acquire(rows, Tiles::kTileBytes);
        tma_load(keys_at(rows.stage), &k_map, at.kv * kWidth, tile * kKeys, at.b, keys_full);
        const unsigned values_full = value_pipeline.acquire(rows, Tiles::kTileBytes);
        tma_load(values_at(rows.stage), &v_map, at.kv * kWidth, tile * kKeys, at.b, values_full);
      }
    }
    return;
  }

  warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp;
  const bool elected = threadIdx.x % kWarp == 0;
  unsigned char* const own_tile = shared + Tiles::kTiles + warp * Tiles::kWarpTile;
  const unsigned own_queries = queries + warpgroup * Tiles::kOwnQueries * Tiles::kRowBytes;
  PipelineState rows = PipelineState::of_consumer(), query = PipelineState::of_consumer();
  for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x, query_pipeline.advance(query)) {
    const QueryTile<Tiles> at(a, order, block);
    const int own_first = at.first_query + warpgroup * Tiles::kOwnQueries;
    const int warp_query = own_first + warp % 4 * 16, warp_position = warp_query + a.first();
    const int tiles = own_first < a.queries ? at.tiles_until(a, own_first + Tiles::kOwnQueries) : 0;
    // A negative scale flips the products' signs, so that the greatest product is the greatest score.
    const float signed_scale = softmax_scale_log2(a.gain[at.h], a.root), scale = fabsf(signed_scale);

    // Bounded scores need no running maximum: the first tile's will do where what exceeds it, by at most twice the
    // bound, does not overflow. In bf16 it does not: probabilities reach 2^100, their sums with values T·max|v| times
    // that.
    constexpr float kBound = 1.01f * kWidth, kMostExponent = 50.0f;
    const bool bounded = std::is_same_v<S, bf16> && a.normed && kBound * scale <= kMostExponent;

    Accumulator<1, kKeys> s;
    Accumulator<1, kWidth> o = {};
    unsigned p[kKeys / 16][4];  // the probabilities of the tile before
    float row_max[1][2] = {{-INFINITY, -INFINITY}}, row_sum[1][2] = {}, rescale[2];
    const auto begin_scores = [&](int from) {
      const std::uint64_t own_rows = matrix_descriptor(own_queries), keys = matrix_descriptor(keys_at(from));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k)
        wgmma_m64n128k16<S>(s[0], advance_descriptor(own_rows, k * 32), advance_descriptor(keys, k * 32), k > 0);
      wgmma_commit_group();
    };
    const auto begin_outputs = [&](int from) {
      const std::uint64_t values = matrix_descriptor(values_at(from));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        wgmma_m64n64k16<S, Major::mn>(o[0], p[k], advance_descriptor(values, k * 16 * Tiles::kRowBytes));
      wgmma_commit_group();
    };
    // s becomes probabilities under the new row maximum; `rescale` brings the sums so far to it.
    const auto softmax = [&](int tile) {
      if (signed_scale < 0.0f) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[0][n][i] = -s[0][n][i];
      }
      causal_mask<false, 1, kKeys>(s, warp_position, tile * kKeys, -INFINITY);
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        float best = row_max[0][half_row];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) best = fmaxf(best, fmaxf(s[0][n][2 * half_row], s[0][n][2 * half_row + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        rescale[half_row] = exp2_approximate((row_max[0][half_row] - best) * scale);
        row_max[0][half_row] = best;
        row_sum[0][half_row] *= rescale[half_row];
        const float shift = best * scale;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half_row; i < 2 * half_row + 2; ++i) {
            s[0][n][i] = exp2_approximate(fmaf(s[0][n][i], scale, -shift));
            row_sum[0][half_row] += s[0][n][i];
          }
      }
    };
    // The same under the row maximum so far.
    const auto softmax_fixed_max = [&](int tile) {
      causal_mask<false, 1, kKeys>(s, warp_position, tile * kKeys, copysignf(INFINITY, -signed_scale));
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const float shift = row_max[0][half_row] * scale;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half_row; i < 2 * half_row + 2; ++i) {
            s[0][n][i] = exp2_approximate(fmaf(s[0][n][i], signed_scale, -shift));
            row_sum[0][half_row] += s[0][n][i];
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
        wgmma_wait_group<1>();
      } else {
        wgmma_wait_group<0>();
      }
      fence_operand(s[0]);
      if (elected) key_pipeline.release(rows.stage);
      if (elected && tile == tiles - 1) query_pipeline.release(query.stage);
      if (again)
        softmax_fixed_max(tile);
      else
        softmax(tile);
      if (a.T < 0) {  // keep_live: ptxas else sinks the exponentials below the wait
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) keep_live(s[0][n], queries);
      }
      wgmma_wait_group<0>();
      fence_operand(o[0]);
      if (elected && tile > 0) value_pipeline.release(last);
      if (!again) {
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[0][n][i] *= rescale[i / 2];
      }
      round_fragments<S, kKeys>(p, s[0]);
      last = rows.stage;
      key_pipeline.advance(rows);
    }
    if (tiles > 0) {
      value_pipeline.wait(last, rows.phase_before());
      begin_outputs(last);
      wgmma_wait_group<0>();
      fence_operand(o[0]);
      if (elected) value_pipeline.release(last);
    } else if (elected) {
      query_pipeline.release(query.stage);
    }
    for (int tile = tiles; tile < at.tiles; ++tile, key_pipeline.advance(rows)) {  // that only later queries see
      key_pipeline.wait(rows);
      if (elected) key_pipeline.release(rows.stage);
      value_pipeline.wait(rows);
      if (elected) value_pipeline.release(rows.stage);
    }
    if (tiles == 0) continue;

    finalize_softmax<1, kWidth>(o, row_max, row_sum, scale, a.lse + a.row_at(at.b, at.h), warp_query, a.queries);
    __syncwarp();  // the rows before have left the tile
    store_rows<S, kWidth, 1>(own_tile, o, a.o + a.head_at(at.b, at.h), a.H * a.D, warp_query, a.queries, a.D);
  }
}

template <class S>
void launch_attention_forward(const CudaBackend& backend, const AttentionArgs<S>& a) {
  using Tiles = ForwardTiles;
  const i64 key_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(S);
  const TileScheduler order(a.batch * a.H, blocks_for(a.queries, Tiles::kQueries), a.group(), key_bytes);
  const DType dtype = backend.dtype();
  const unsigned blocks = std::min(order.blocks(), static_cast<unsigned>(backend.sm_count()));
  launch("attention_forward", attention_forward<S>, blocks, Tiles::kThreads, Tiles::kSharedBytes, backend.stream(),
         tensor_map(a.q, dtype, a.batch, a.queries, a.H * a.D, Tiles::kQueries),
         tensor_map(a.k, dtype, a.batch, a.T, a.K * a.D, Tiles::kKeys),
         tensor_map(a.v, dtype, a.batch, a.T, a.K * a.D, Tiles::kKeys), a, order);
}

}  // namespace pgolf::cuda::sm90
