// y ← a·x + b·y, for averages of weights.
#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

using AverageElements = Elements<4>;

// y ← a·x + b·y. Memory-bound: 2 reads, 1 write.
__global__ void __launch_bounds__(kThreads)
    average(float a, const float* x, float b, float* y, i64 size, const StepValues* gate) {
  const i64 begin = blockIdx.x * AverageElements::kChunk, left = size - begin;
  AverageElements from, to;
  from.load(x + begin, left);
  to.load(y + begin, left);
  if (gate && gate->stopped) return;
#pragma unroll
  for (int i = 0; i < AverageElements::kCount; ++i) to.x[i] = a * from.x[i] + b * to.x[i];
  to.store(y + begin, left);
}

}  // namespace

void CudaBackend::axpby(double a, const TensorView& x, double b, const TensorView& y, const StepValues* gate) {
  if (x.size() == 0) return;
  average<<<blocks_for(x.size(), AverageElements::kChunk), kThreads, 0, stream()>>>(
      static_cast<float>(a), x.as<float>(), static_cast<float>(b), y.as<float>(), x.size(), gate);
  PGOLF_LAUNCHED("average");
}

}  // namespace pgolf::cuda
