// Attention in float32 without tensor cores, for reference: exact exponentials, plain sums, one warp for four rows.
//
// The three kernels have one shape. A block owns kRows rows (queries, or keys for dkdv) and loads tiles of kTile rows
// of the other side into shared memory. For scores a lane owns a row of the tile, for sums of rows it owns columns.
#include <cfloat>

#include "cuda/attention.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kWarpRows = 4, kRows = kWarps * kWarpRows, kTile = kWarp;
constexpr int kColumns = kMostHeadWidth / kWarp;  // that a lane owns at most

using Sums = float[kWarpRows][kColumns];

// Elements from a row to the next in shared memory: an odd number of 16-byte chunks, for different banks.
__host__ __device__ constexpr int stride_of(int D) { return D + 4; }
// own: tensors of the block's rows, besides tiles of two; weights: numbers for each pair of a row and a tile's row
constexpr std::size_t shared_bytes(int D, int own, int weights) {
  return static_cast<std::size_t>((own * kRows + 2 * kTile) * stride_of(D) + weights * kRows * kTile) * sizeof(float);
}

__device__ void load_rows(float* to, const float* head, int stride, int first, int rows, int T, int D) {
  for (int i = threadIdx.x; i < rows * (D / 4); i += kThreads) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    *reinterpret_cast<float4*>(to + row * stride_of(D) + column) =
        first + row < T ? *reinterpret_cast<const float4*>(head + static_cast<i64>(first + row) * stride + column)
                        : float4{0.0f, 0.0f, 0.0f, 0.0f};
  }
}

// s[r] = row r · this lane's row of the tile
__device__ void multiply_transposed(float (&s)[kWarpRows], const float* rows, const float* tile, int D) {
  const float* own = tile + threadIdx.x % kWarp * stride_of(D);
#pragma unroll
  for (float& x : s) x = 0.0f;
  for (int j = 0; j < D; j += 4) {
    const float4 y = *reinterpret_cast<const float4*>(own + j);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float4 x = *reinterpret_cast<const float4*>(rows + r * stride_of(D) + j);
      s[r] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, s[r]))));
    }
  }
}

// sum[r] += Σⱼ weights[r][j]·tile[j]; `weights` is the warp's own shared memory for the lanes' w.
__device__ void multiply_accumulate(Sums& sum, const float (&w)[kWarpRows], float* weights, const float* tile, int D) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) weights[r * kTile + lane] = w[r];
  __syncwarp();
#pragma unroll 4
  for (int j = 0; j < kTile; ++j)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c * kWarp + lane < D) {
        const float y = tile[j * stride_of(D) + c * kWarp + lane];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) sum[r][c] = fmaf(weights[r * kTile + j], y, sum[r][c]);
      }
}

__device__ void store_rows(float* head, const Sums& x, int stride, int first, int T, int D) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (first + r < T && c * kWarp + lane < D)
        head[static_cast<i64>(first + r) * stride + c * kWarp + lane] = x[r][c];
}

__global__ void __launch_bounds__(kThreads) attention_forward(const AttentionArgs<float> a, const TileScheduler order) {
  extern __shared__ __align__(16) float shared[];
  const int stride = stride_of(a.D), warp_row = threadIdx.x / kWarp * kWarpRows, lane = threadIdx.x % kWarp;
  float *rows = shared, *keys = rows + kRows * stride, *values = keys + kTile * stride;
  float* weights = values + kTile * stride + warp_row * kTile;

  const TileScheduler::Place place = order.at(blockIdx.x);
  const int b = place.head / a.H, h = place.head % a.H;
  const int first_query = (order.tiles - 1 - place.rank) * kRows, warp_query = first_query + warp_row;
  const i64 head = a.head_at(b, h), kv_head = a.kv_head_at(b, h / a.group());
  const float scale = a.gain[h] * a.root;
  load_rows(rows, a.q + head, a.H * a.D, first_query, kRows, a.queries, a.D);

  Sums o = {};
  float row_max[kWarpRows], row_sum[kWarpRows] = {};
#pragma unroll
  for (float& x : row_max) x = -INFINITY;
  for (int first_key = 0; first_key < min(a.first() + first_query + kRows, a.T); first_key += kTile) {
    __syncthreads();
    load_rows(keys, a.k + kv_head, a.K * a.D, first_key, kTile, a.T, a.D);
    load_rows(values, a.v + kv_head, a.K * a.D, first_key, kTile, a.T, a.D);
    __syncthreads();
    float p[kWarpRows];
    multiply_transposed(p, rows + warp_row * stride, keys, a.D);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float score = first_key + lane <= a.first() + warp_query + r ? scale * p[r] : -INFINITY;
      const float best = fmaxf(row_max[r], warp_max(score)), rescale = expf(row_max[r] - best);
      p[r] = expf(score - best);
      row_sum[r] = row_sum[r] * rescale + warp_sum(p[r]);
      row_max[r] = best;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) o[r][c] *= rescale;
    }
    multiply_accumulate(o, p, weights, values, a.D);
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) o[r][c] /= row_sum[r];
    if (lane == 0 && warp_query + r < a.queries) a.lse[a.row_at(b, h) + warp_query + r] = row_max[r] + logf(row_sum[r]);
  }
  store_rows(a.o + head, o, a.H * a.D, warp_query, a.queries, a.D);
}

__global__ void __launch_bounds__(kThreads)
    attention_dq(const AttentionArgs<float> a, const AttentionGradArgs<float> g, const TileScheduler order) {
  extern __shared__ __align__(16) float shared[];
  const int stride = stride_of(a.D), warp_row = threadIdx.x / kWarp * kWarpRows, lane = threadIdx.x % kWarp;
  float *q = shared, *d_o = q + kRows * stride, *keys = d_o + kRows * stride, *values = keys + kTile * stride;
  float* weights = values + kTile * stride + warp_row * kTile;

  const TileScheduler::Place place = order.at(blockIdx.x);
  const int b = place.head / a.H, h = place.head % a.H;
  const int query_tile = order.tiles - 1 - place.rank, first_query = query_tile * kRows;
  const int warp_query = first_query + warp_row;
  const i64 head = a.head_at(b, h), head_row = a.row_at(b, h), kv_head = a.kv_head_at(b, h / a.group());
  const float gain = a.gain[h], scale = gain * a.root;
  load_rows(q, a.q + head, a.H * a.D, first_query, kRows, a.T, a.D);
  load_rows(d_o, g.d_o + head, a.H * a.D, first_query, kRows, a.T, a.D);
  __syncthreads();

  float lse[kWarpRows] = {}, delta[kWarpRows] = {};
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int query = warp_query + r;
    if (query >= a.T) continue;
    lse[r] = a.lse[head_row + query];
    for (int j = lane; j < a.D; j += kWarp)
      delta[r] = fmaf(d_o[(warp_row + r) * stride + j], g.o[head + static_cast<i64>(query) * a.H * a.D + j], delta[r]);
    delta[r] = warp_sum(delta[r]);
    if (lane == 0) g.delta[head_row + query] = gain * delta[r];
  }

  Sums sum = {};
  for (int first_key = 0; first_key < min(first_query + kRows, a.T); first_key += kTile) {
    __syncthreads();
    load_rows(keys, a.k + kv_head, a.K * a.D, first_key, kTile, a.T, a.D);
    load_rows(values, a.v + kv_head, a.K * a.D, first_key, kTile, a.T, a.D);
    __syncthreads();
    float p[kWarpRows], ds[kWarpRows];
    multiply_transposed(p, q + warp_row * stride, keys, a.D);
    multiply_transposed(ds, d_o + warp_row * stride, values, a.D);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      p[r] = first_key + lane <= warp_query + r ? expf(scale * p[r] - lse[r]) : 0.0f;
      ds[r] = p[r] * (ds[r] - delta[r]);
    }
    multiply_accumulate(sum, ds, weights, keys, a.D);
  }

  float dgain = 0.0f;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c * kWarp + lane < a.D) {
        dgain = fmaf(sum[r][c], q[(warp_row + r) * stride + c * kWarp + lane], dgain);
        sum[r][c] *= scale;
      }
  store_rows(g.head(a, b, h), sum, g.stride(a), warp_query, a.T, a.D);
  __syncthreads();  // the first numbers of `keys` are free
  dgain = block_sum(dgain, keys);
  if (threadIdx.x == 0) g.dgain[(static_cast<i64>(h) * a.batch + b) * order.tiles + query_tile] = a.root * dgain;
}

__global__ void __launch_bounds__(kThreads)
    attention_dkdv(const AttentionArgs<float> a, const AttentionGradArgs<float> g, const TileScheduler order) {
  extern __shared__ __align__(16) float shared[];
  const int stride = stride_of(a.D), warp_row = threadIdx.x / kWarp * kWarpRows, lane = threadIdx.x % kWarp;
  float *keys = shared, *values = keys + kRows * stride, *q = values + kRows * stride, *d_o = q + kTile * stride;
  float *p_weights = d_o + kTile * stride + warp_row * kTile, *ds_weights = p_weights + kRows * kTile;

  const TileScheduler::Place place = order.at(blockIdx.x);
  const int b = place.head / a.K, kv = place.head % a.K, first_key = place.rank * kRows;
  const int warp_key = first_key + warp_row;
  const i64 kv_head = a.kv_head_at(b, kv);
  load_rows(keys, a.k + kv_head, a.K * a.D, first_key, kRows, a.T, a.D);
  load_rows(values, a.v + kv_head, a.K * a.D, first_key, kRows, a.T, a.D);

  Sums dk = {}, dv = {};
  for (int h = kv * a.group(); h < (kv + 1) * a.group(); ++h) {
    const i64 head = a.head_at(b, h), head_row = a.row_at(b, h);
    const float gain = a.gain[h], scale = gain * a.root;
    for (int first_query = first_key / kTile * kTile; first_query < a.T; first_query += kTile) {
      __syncthreads();
      load_rows(q, a.q + head, a.H * a.D, first_query, kTile, a.T, a.D);
      load_rows(d_o, g.d_o + head, a.H * a.D, first_query, kTile, a.T, a.D);
      __syncthreads();
      const int query = first_query + lane;
      const float lse = query < a.T ? a.lse[head_row + query] : 0.0f;
      const float delta = query < a.T ? g.delta[head_row + query] : 0.0f;
      float p[kWarpRows], ds[kWarpRows];
      multiply_transposed(p, keys + warp_row * stride, q, a.D);
      multiply_transposed(ds, values + warp_row * stride, d_o, a.D);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        p[r] = warp_key + r <= query && query < a.T ? expf(scale * p[r] - lse) : 0.0f;
        ds[r] = p[r] * (gain * ds[r] - delta);
      }
      multiply_accumulate(dv, p, p_weights, d_o, a.D);
      multiply_accumulate(dk, ds, ds_weights, q, a.D);
    }
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) dk[r][c] *= a.root;
  store_rows(g.head(a, b, a.H + kv), dk, g.stride(a), warp_key, a.T, a.D);
  store_rows(g.head(a, b, a.H + a.K + kv), dv, g.stride(a), warp_key, a.T, a.D);
}

constexpr std::size_t forward_bytes(int D) { return shared_bytes(D, 1, 1); }
constexpr std::size_t dq_bytes(int D) { return shared_bytes(D, 2, 1); }
constexpr std::size_t dkdv_bytes(int D) { return shared_bytes(D, 2, 2); }
static_assert(dkdv_bytes(kMostHeadWidth) <= kSharedOnEveryGpu);

}  // namespace

template <>
int AttentionKernels<float>::dq_rows(int) {
  return kRows;
}

template <>
void AttentionKernels<float>::forward(const AttentionArgs<float>& a, cudaStream_t stream) {
  const i64 head_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(float);
  const TileScheduler order(a.batch * a.H, blocks_for(a.queries, kRows), a.group(), head_bytes);
  launch("attention_forward", attention_forward, order.blocks(), kThreads, forward_bytes(a.D), stream, a, order);
}

template <>
void AttentionKernels<float>::backward(const AttentionArgs<float>& a, const AttentionGradArgs<float>& g,
                                       cudaStream_t stream) {
  const i64 head_bytes = static_cast<i64>(a.T) * a.D * 2 * sizeof(float);
  const TileScheduler by_query(a.batch * a.H, blocks_for(a.T, kRows), a.group(), head_bytes);
  launch("attention_dq", attention_dq, by_query.blocks(), kThreads, dq_bytes(a.D), stream, a, g, by_query);
  const TileScheduler by_key(a.batch * a.K, blocks_for(a.T, kRows), 1, head_bytes * a.group());
  launch("attention_dkdv", attention_dkdv, by_key.blocks(), kThreads, dkdv_bytes(a.D), stream, a, g, by_key);
}

}  // namespace pgolf::cuda
