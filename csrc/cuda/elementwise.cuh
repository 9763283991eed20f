// Element-wise kernels.
#pragma once

#include "cuda/common.cuh"

namespace pgolf::cuda {

inline constexpr int kElementThreads = 256;
inline unsigned element_blocks(i64 count) { return blocks_for(count, kElementThreads * kVector); }

// to[i] = body(to[i], also[i], i % 8), eight elements a thread; the last thread takes the remainder.
template <class S, class Also, class F>
__device__ __forceinline__ void for_each_element(S* to, const Also* also, i64 count, F body) {
  const i64 index = i64{blockIdx.x} * kElementThreads + threadIdx.x, at = index * kVector;
  if (at + kVector <= count) {
    Vector8 a = load8<S>(to + at), b = load8(also + at);
#pragma unroll
    for (int j = 0; j < kVector; ++j) a.x[j] = body(a.x[j], b.x[j], j);
    store8(to + at, a);
  } else {
    for (i64 i = at; i < count; ++i) to[i] = from_float<S>(body(to_float(to[i]), to_float(also[i]), int(i - at)));
  }
}

// Signs that stand beside numbers, eight to a byte (SquaredRelu::negative), and as the sign bits of eight 16-bit
// numbers that have none of their own.
__device__ __forceinline__ uint4 with_signs(uint4 numbers, unsigned byte) {
  unsigned* const pairs = reinterpret_cast<unsigned*>(&numbers);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] |= (byte >> (2 * i) & 1) << 15 | (byte >> (2 * i + 1) & 1) << 31;
  return numbers;
}
__device__ __forceinline__ unsigned take_signs(uint4& numbers) {
  unsigned* const pairs = reinterpret_cast<unsigned*>(&numbers);
  unsigned byte = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    byte |= (pairs[i] >> 15 & 1) << (2 * i) | pairs[i] >> 31 << (2 * i + 1);
    pairs[i] &= 0x7fff7fffu;
  }
  return byte;
}

}  // namespace pgolf::cuda
