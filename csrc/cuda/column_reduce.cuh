// Column reductions, for the gradients of vectors: every block writes partial sums, which are then added in order.
#pragma once

#include <algorithm>

#include "cuda/row_ops.cuh"

namespace pgolf::cuda {

// Blocks of a kernel that sums columns over `rows`: at least 64 rows each, and at most 1,024 partials.
inline i64 column_blocks(i64 rows) { return std::min<i64>((rows + 63) / 64, 1024); }

// partial[0 … d) = the block's sums, from what each thread summed over the rows of its team; teams take turns in
// `shared` [d]. Called by all threads of the block.
template <int kVectors>
__device__ __forceinline__ void store_columns(const Team& team, const Vector8 (&sums)[kVectors], int d, float* shared,
                                              float* partial) {
  for (int turn = 0; turn < team.teams(); ++turn) {
    if (turn == team.index) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (team.column(v) >= d) break;
        float* at = shared + team.column(v);
#pragma unroll
        for (int j = 0; j < kVector; ++j) at[j] = (turn ? at[j] : 0.0f) + sums[v].x[j];
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < d; i += kRowThreads) partial[i] = shared[i];
  __syncthreads();
}

// first[c] += column c of partial [partials, stride], c < width; from `split` on second[c − split] += instead.
static __global__ void __launch_bounds__(kWarp* kWarp)
    add_columns_kernel(const float* __restrict__ partial, i64 partials, i64 stride, i64 width, i64 split, float* first,
                       float* second) {
  __shared__ float sums[kWarp][kWarp + 1];
  const i64 column = i64{blockIdx.x} * kWarp + threadIdx.x;
  float sum = 0;
  if (column < width)
    for (i64 i = threadIdx.y; i < partials; i += kWarp) sum += partial[i * stride + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
  for (int i = 1; i < kWarp; ++i) sum += sums[i][threadIdx.x];
  *(column < split ? first + column : second + (column - split)) += sum;
}

inline void add_columns(cudaStream_t stream, const float* partial, i64 partials, i64 stride, i64 width, float* first,
                        i64 split, float* second) {
  add_columns_kernel<<<blocks_for(width, kWarp), dim3(kWarp, kWarp), 0, stream>>>(partial, partials, stride, width,
                                                                                  split, first, second);
  PGOLF_LAUNCHED("add_columns");
}

}  // namespace pgolf::cuda
