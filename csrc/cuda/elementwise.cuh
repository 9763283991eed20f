// Element-wise kernels.
#pragma once

#include "cuda/common.cuh"

namespace pgolf::cuda {

inline constexpr int kElementThreads = 256;
inline unsigned element_blocks(i64 count) { return blocks_for(count, kElementThreads * kVector); }

// to[i] = body(to[i], also[i]), eight elements a thread; the last thread takes the remainder.
template <class S, class Also, class F>
__device__ __forceinline__ void for_each_element(S* to, const Also* also, i64 count, F body) {
  const i64 index = i64{blockIdx.x} * kElementThreads + threadIdx.x, at = index * kVector;
  if (at + kVector <= count) {
    Vector8 a = load8<S>(to + at), b = load8(also + at);
#pragma unroll
    for (int j = 0; j < kVector; ++j) a.x[j] = body(a.x[j], b.x[j]);
    store8(to + at, a);
  } else {
    for (i64 i = at; i < count; ++i) to[i] = from_float<S>(body(to_float(to[i]), to_float(also[i])));
  }
}

}  // namespace pgolf::cuda
