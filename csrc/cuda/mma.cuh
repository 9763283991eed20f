// PTX of tensor cores (ldmatrix, mma) and asynchronous copies (cp.async), with fallbacks below sm_80.
//
// Fragments of 16-bit numbers as a warp holds them (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With g = lane/4 and
// t = lane%4, each register being two neighbours,
//   A [16, 16]  a[0] row g, columns 2t, 2t+1; a[1] row g+8; a[2] and a[3] the same rows, columns 2t+8, 2t+9
//   B [16, 8]   b[0] rows 2t, 2t+1 of column g; b[1] rows 2t+8, 2t+9
//   C [16, 8]   c[0], c[1] row g, columns 2t, 2t+1; c[2], c[3] row g+8; float32
// So two rounded C fragments side by side are an A fragment.
#pragma once

#include "cuda/common.cuh"

namespace pgolf::cuda {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four 8×8 matrices; lane l gives the address of row l%8 of matrix l/8. Matrix i arrives in r[i] as an A fragment's
// quarter; transposed, it is half a B fragment of what is stored.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a·b
template <class S>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  static_assert(std::is_same_v<S, bf16> || std::is_same_v<S, half>);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<S, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  if constexpr (std::is_same_v<S, bf16>) {
    __trap();  // no bf16 before sm_80: the backend refuses the dtype there
  } else {
    // m16n8k8: the two halves of k, one after the other.
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
  }
#endif
}

// Copies 16 or 4 bytes to shared memory, or writes zeros there if not `valid`: then nothing is read. Complete after
// cp_async_wait_all; below sm_80 at once.
__device__ __forceinline__ void cp_async_16(unsigned to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  const uint4 x = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}
__device__ __forceinline__ void cp_async_4(unsigned to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
  const unsigned x = valid ? *static_cast<const unsigned*>(from) : 0;
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
#endif
}
// Waits for this thread's copies; a __syncthreads after it makes those of the block visible.
__device__ __forceinline__ void cp_async_wait_all() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// 2^x to 2 ulp; 2^0 = 1 and 2^−∞ = 0 exactly.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// √x to a relative 2⁻²³; 0 for x below 2⁻¹²⁶.
__device__ __forceinline__ float sqrt_approximate(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to S, `low` in the lower half.
template <class S>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<S, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}
template <class S>
__device__ __forceinline__ float2 unpack(unsigned pair) {
  if constexpr (std::is_same_v<S, bf16>)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

}  // namespace pgolf::cuda
