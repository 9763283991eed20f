// AdamW on many tensors in one launch.  docs/spec.md §3
#include "cuda/adam_step.cuh"
#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

using AdamElements = Elements<2>;

struct AdamEntry {
  float* w;
  const float* grad;
  float *m, *v;
  i64 size;
  int group;
};
// Memory-bound: 4 reads, 3 writes. The float64 arithmetic of the constants is done once a block, while data travels.
__global__ void __launch_bounds__(kThreads)
    adam_update(const __grid_constant__ TensorList<AdamEntry> tensors, const StepValues* values) {
  __shared__ AdamConstants shared;
  const int index = tensors.entry_of(blockIdx.x);
  const AdamEntry& t = tensors.entries[index];
  const i64 begin = static_cast<i64>(blockIdx.x - tensors.first[index]) * AdamElements::kChunk;
  const i64 left = t.size - begin;
  AdamElements w, grad, m, v;
  grad.load(t.grad + begin, left);
  m.load(t.m + begin, left);
  v.load(t.v + begin, left);
  w.load(t.w + begin, left);
  if (threadIdx.x == 0) {
    shared.set(values->beta1, values->beta2, values->eps, values->bias1, values->bias2, values->grad_scale,
               values->lr[t.group], values->weight_decay[t.group]);
    shared.finite = values->finite;
  }
  __syncthreads();
  if (!shared.finite) return;
  const AdamConstants c = shared;
#pragma unroll
  for (int i = 0; i < AdamElements::kCount; ++i) c.step(grad.x[i], w.x[i], m.x[i], v.x[i]);
  m.store(t.m + begin, left);
  v.store(t.v + begin, left);
  w.store(t.w + begin, left);
}

}  // namespace

void CudaBackend::adam(std::span<const AdamTensor> tensors, const StepValues* values) {
  multi_tensor_apply(
      tensors,
      [](const AdamTensor& t) {
        return AdamEntry{t.w.as<float>(), t.grad.as<float>(), t.m.as<float>(), t.v.as<float>(), t.w.size(), t.group};
      },
      [](const AdamEntry& e) { return (e.size + AdamElements::kChunk - 1) / AdamElements::kChunk; },
      [&](const TensorList<AdamEntry>& batch) {
        adam_update<<<batch.blocks, kThreads, 0, stream()>>>(batch, values);
        PGOLF_LAUNCHED("adam_update");
      });
}

}  // namespace pgolf::cuda
