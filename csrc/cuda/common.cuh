// What every kernel of this folder uses: checked calls, storage types, vectors of eight, ordered reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "core/error.h"
#include "core/memory.h"
#include "cuda/cuda_backend.h"

namespace pgolf::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // clears an error that is not sticky, so that it is not reported twice
  throw DeviceError(sentence("CUDA failed in ", what, ": ", cudaGetErrorString(status), "."));
}
#define PGOLF_CUDA(call) ::pgolf::cuda::check((call), #call)
#define PGOLF_LAUNCHED(kernel) ::pgolf::cuda::check(cudaGetLastError(), kernel)

using bf16 = __nv_bfloat16;
using half = __half;

// Calls body(S{}) with the C++ type of a storage dtype.
template <class F>
decltype(auto) with_storage(DType dtype, F&& body) {
  switch (dtype) {
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(half{});
    default:
      return body(float{});
  }
}

template <class S>
__device__ __forceinline__ float to_float(S x) {
  return static_cast<float>(x);
}
template <class S>
__device__ __forceinline__ S from_float(float x) {  // to nearest, ties to even
  if constexpr (sizeof(S) == 4)
    return x;
  else if constexpr (std::is_same_v<S, bf16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// Eight neighbouring numbers, read and written in 16-byte pieces; pointers must be aligned to 16 bytes.
inline constexpr int kVector = 8;
struct Vector8 {
  float x[kVector];
};
template <class S>
__device__ __forceinline__ Vector8 load8(const S* from) {
  constexpr int pieces = kVector * sizeof(S) / 16;
  alignas(16) S raw[kVector];
#pragma unroll
  for (int i = 0; i < pieces; ++i) reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
  Vector8 v;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v.x[i] = to_float(raw[i]);
  return v;
}
template <class S>
__device__ __forceinline__ void store8(S* to, const Vector8& v) {
  constexpr int pieces = kVector * sizeof(S) / 16;
  alignas(16) S raw[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) raw[i] = from_float<S>(v.x[i]);
#pragma unroll
  for (int i = 0; i < pieces; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(raw)[i];
}

inline constexpr int kWarp = 32;

// Butterfly sums: every lane gets the total, in an order that depends on nothing.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// The sum over a block of at most 1,024 threads (a multiple of 32); every thread gets it. `shared` has 32 elements and
// may be used again after the next __syncthreads.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? shared[lane] : T(0));
  return x;
}

// Release-increment of a global counter, between blocks of one launch: covers the stores of this thread, and of threads
// that have synchronised with it since.
__device__ __forceinline__ void release_increment(unsigned* counter, unsigned count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(count) : "memory");
}
// Spins until an acquire-load finds *counter ≥ count: then this thread, and threads that synchronise with it next, see
// the stores before those increments.
__device__ __forceinline__ void acquire_at_least(const unsigned* counter, unsigned count) {
  unsigned found;
  while (true) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    if (found >= count) return;
    __nanosleep(32);
  }
}

inline unsigned blocks_for(i64 count, i64 per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

// Places buffers in an operation's saved or scratch area. Run once with a null base to learn the size, and again with
// the real base to get the pointers: the two cannot disagree.
class Layout {
 public:
  static constexpr std::size_t kAlign = 256;
  explicit Layout(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(i64 count) {
    return static_cast<U*>(bytes(static_cast<std::size_t>(count) * sizeof(U)));
  }
  void* take(DType dtype, i64 count) { return bytes(static_cast<std::size_t>(count) * size_of(dtype)); }
  std::size_t used() const { return used_; }

 private:
  void* bytes(std::size_t count) {
    void* pointer = base_ ? base_ + used_ : nullptr;
    used_ += (count + kAlign - 1) / kAlign * kAlign;
    return pointer;
  }
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace pgolf::cuda
