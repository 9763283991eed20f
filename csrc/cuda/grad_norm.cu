// The norm of all gradients, and the sum of a tensor: in float64, in two stages. Stage 1 leaves a partial sum for each
// block, stage 2 adds them in one block.  docs/spec.md §3
#include "grad_norm.h"

#include <algorithm>

#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

using SumElements = Elements<4>;

struct Gradient {
  const float* x;
  i64 size;
};

// partials[block] += its chunks' sum of squares. Memory-bound: 1 read.
__global__ void __launch_bounds__(kThreads)
    sum_squares(const __grid_constant__ TensorList<Gradient> grads, double* partials) {
  __shared__ double shared[kWarp];
  double sum = 0;
  for (unsigned chunk = blockIdx.x; chunk < grads.blocks; chunk += gridDim.x) {
    const int index = grads.entry_of(chunk);
    const i64 begin = static_cast<i64>(chunk - grads.first[index]) * SumElements::kChunk;
    SumElements g;
    g.load(grads.entries[index].x + begin, grads.entries[index].size - begin);
#pragma unroll
    for (float x : g.x) sum += static_cast<double>(x) * static_cast<double>(x);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] += sum;
}

__global__ void __launch_bounds__(CudaBackend::kPartials) finish_norm(const double* partials, StepValues* v) {
  __shared__ double shared[kWarp];
  const double scaled_norm = sqrt(block_sum(partials[threadIdx.x], shared));
  if (threadIdx.x == 0) settle_step(scaled_norm, v);
}

__global__ void __launch_bounds__(kThreads) sum_elements(const float* x, i64 size, double* partials) {
  __shared__ double shared[kWarp];
  double sum = 0;
  const i64 stride = static_cast<i64>(gridDim.x) * SumElements::kChunk;
  for (i64 begin = blockIdx.x * SumElements::kChunk; begin < size; begin += stride) {
    SumElements e;
    e.load(x + begin, size - begin);
#pragma unroll
    for (float value : e.x) sum += static_cast<double>(value);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(CudaBackend::kPartials) add_partials(const double* partials, int count, double* sum) {
  __shared__ double shared[kWarp];
  const double total = block_sum(static_cast<int>(threadIdx.x) < count ? partials[threadIdx.x] : 0.0, shared);
  if (threadIdx.x == 0) *sum += total;
}

}  // namespace

void CudaBackend::grad_norm(std::span<const TensorView> grads, StepValues* values) {
  PGOLF_CUDA(cudaMemsetAsync(partials_, 0, kPartials * sizeof(double), stream()));
  multi_tensor_apply(
      grads, [](const TensorView& t) { return Gradient{t.as<float>(), t.size()}; },
      [](const Gradient& g) { return (g.size + SumElements::kChunk - 1) / SumElements::kChunk; },
      [&](const TensorList<Gradient>& batch) {
        sum_squares<<<kPartials, kThreads, 0, stream()>>>(batch, partials_);
        PGOLF_LAUNCHED("sum_squares");
      });
  finish_norm<<<1, kPartials, 0, stream()>>>(partials_, values);
  PGOLF_LAUNCHED("finish_norm");
}

void CudaBackend::add_sum(const TensorView& t, double* sum) {
  if (t.size() == 0) return;
  const unsigned blocks = std::min<unsigned>(kPartials, blocks_for(t.size(), SumElements::kChunk));
  sum_elements<<<blocks, kThreads, 0, stream()>>>(t.as<float>(), t.size(), partials_);
  PGOLF_LAUNCHED("sum_elements");
  add_partials<<<1, kPartials, 0, stream()>>>(partials_, static_cast<int>(blocks), sum);
  PGOLF_LAUNCHED("add_partials");
}

}  // namespace pgolf::cuda
