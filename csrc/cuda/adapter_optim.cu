// Test-time training's adapters: initial numbers and Adam for rows of many documents, each at a step of its own.
// Rows need not be aligned.
#include <cmath>

#include "core/random.h"
#include "cuda/adam_step.cuh"
#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

constexpr i64 kAdapterChunk = 4 * kThreads;  // of a row, done by one block

template <class S>
struct AdapterEntry {
  float* w;
  const float* grad;
  float *m, *v;
  S* copy;  // may be null
  i64 size, a_size;
  double bound;
  std::uint32_t streams[2];
  int products;

  __host__ __device__ i64 pieces() const { return (size + kAdapterChunk - 1) / kAdapterChunk; }
  // body(i, at) for the thread's numbers i of a row, which lie at `at`.
  template <class F>
  __device__ __forceinline__ void for_numbers(i64 row, i64 piece, F body) const {
#pragma unroll
    for (int j = 0; j < static_cast<int>(kAdapterChunk / kThreads); ++j) {
      const i64 i = piece * kAdapterChunk + j * kThreads + threadIdx.x;
      if (i < size) body(i, row * size + i);
    }
  }
  __device__ __forceinline__ void put(i64 at, float value) const {
    w[at] = value;
    if (copy) copy[at] = from_float<S>(value);
  }
};

// Compute-bound: Philox's ten rounds for every number of an a.
template <class S>
__global__ void __launch_bounds__(kThreads) begin_adapters(const __grid_constant__ TensorList<AdapterEntry<S>> adapters,
                                                           const std::int32_t* documents, std::uint64_t seed) {
  const int index = adapters.entry_of(blockIdx.x);
  const AdapterEntry<S>& t = adapters.entries[index];
  const i64 block = blockIdx.x - adapters.first[index], row = block / t.pieces();
  const std::int32_t document = documents[row];
  if (document < 0) return;
  t.for_numbers(row, block % t.pieces(), [&](i64 i, i64 at) {
    float value = 0.0f;
    if (i < t.products * t.a_size) {
      const bool second = i >= t.a_size;
      const TensorRandom random(seed, t.streams[second], static_cast<std::uint32_t>(document));
      value = static_cast<float>(random.uniform(static_cast<std::uint64_t>(second ? i - t.a_size : i), t.bound));
    }
    t.put(at, value);
    t.m[at] = 0.0f;
    t.v[at] = 0.0f;
  });
}

// Memory-bound: 4 reads, 3 writes and the copy.
template <class S>
__global__ void __launch_bounds__(kThreads) step_adapters(const __grid_constant__ TensorList<AdapterEntry<S>> adapters,
                                                          const std::int32_t* steps, AdapterAdam settings) {
  __shared__ AdamConstants shared;
  const int index = adapters.entry_of(blockIdx.x);
  const AdapterEntry<S>& t = adapters.entries[index];
  const i64 block = blockIdx.x - adapters.first[index], row = block / t.pieces();
  const std::int32_t step = steps[row];
  if (step < 1) return;
  if (threadIdx.x == 0)
    shared.set(settings.beta1, settings.beta2, settings.eps, 1.0 - pow(settings.beta1, static_cast<double>(step)),
               1.0 - pow(settings.beta2, static_cast<double>(step)), settings.grad_scale, settings.lr, 0.0);
  __syncthreads();
  const AdamConstants c = shared;
  t.for_numbers(row, block % t.pieces(), [&](i64, i64 at) {
    float w = t.w[at], m = t.m[at], v = t.v[at];
    c.step(t.grad[at], w, m, v);
    t.put(at, w);
    t.m[at] = m;
    t.v[at] = v;
  });
}

// launch(batch) for all adapters, a block for each piece of each row
template <class S, class F>
void for_adapters(std::span<const AdapterRows> adapters, F&& launch) {
  multi_tensor_apply(
      adapters,
      [](const AdapterRows& t) {
        return AdapterEntry<S>{t.w.as<float>(),
                               t.grad.as<float>(),
                               t.m.as<float>(),
                               t.v.as<float>(),
                               t.copy.as<S>(),
                               t.w.shape[1],
                               t.a_size,
                               t.bound,
                               {t.streams[0], t.streams[1]},
                               t.products};
      },
      [&](const AdapterEntry<S>& t) { return adapters.front().w.shape[0] * t.pieces(); }, launch);
}

}  // namespace

void CudaBackend::adapters_begin(std::span<const AdapterRows> adapters, const TensorView& documents,
                                 std::uint64_t seed) {
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    for_adapters<S>(adapters, [&](const TensorList<AdapterEntry<S>>& batch) {
      begin_adapters<S><<<batch.blocks, kThreads, 0, stream()>>>(batch, documents.as<std::int32_t>(), seed);
      PGOLF_LAUNCHED("begin_adapters");
    });
  });
}

void CudaBackend::adapters_step(std::span<const AdapterRows> adapters, const TensorView& steps,
                                const AdapterAdam& settings) {
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    for_adapters<S>(adapters, [&](const TensorList<AdapterEntry<S>>& batch) {
      step_adapters<S><<<batch.blocks, kThreads, 0, stream()>>>(batch, steps.as<std::int32_t>(), settings);
      PGOLF_LAUNCHED("step_adapters");
    });
  });
}

}  // namespace pgolf::cuda
