// Norm and RoPE of the heads of q and k where a warp holds 16 rows of one as results of products (mma.cuh's lane_row
// and lane_column), and what their backward needs of the forward.
#pragma once

#include "cuda/cuda_backend.h"
#include "cuda/tiles.cuh"

namespace pgolf::cuda {

// The beginning of what Qkv saves: rms factors of N inputs, and of the heads of q, [N', H], and of k, [N, K].
struct HeadFactors {
  float *input, *q, *k;
  HeadFactors(Layout& layout, i64 N, i64 query_heads, i64 key_heads)
      : input(layout.take<float>(N)), q(layout.take<float>(query_heads)), k(layout.take<float>(key_heads)) {}
};

// HeadNorms for kernels; cos null: none.
struct HeadNormArgs {
  const float *cos, *sin, *q_factors, *k_factors;
};

// The angles of a lane's two rows, for its pairs of numbers (j, j + kWidth/2).
template <int kWidth>
struct Angles {
  static constexpr int kTiles = kWidth / 16;  // of columns in half a head
  float2 cosines[2][kTiles], sines[2][kTiles];

  __device__ __forceinline__ void read(int half_row, const float* cos, const float* sin, int position) {
    const i64 at = i64{position} * (kWidth / 2) + lane_column(0);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      cosines[half_row][n] = *reinterpret_cast<const float2*>(cos + at + n * 8);
      sines[half_row][n] = *reinterpret_cast<const float2*>(sin + at + n * 8);
    }
  }
};

// x / y, rounded as by the operator, for y from 2⁻²⁰ to 2²⁰ and x that is 0 or of 2⁻¹⁰⁰ to 2¹⁰⁰: without its branch for
// other numbers, which makes divisions wait for each other. A smaller x may miss by its last bits; an infinite one
// gives a NaN.
__device__ __forceinline__ float quotient(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  inverse = fmaf(inverse, fmaf(-y, inverse, 1.0f), inverse);
  const float near = x * inverse;
  return fmaf(inverse, fmaf(-y, near, x), near);
}

// The gradients at a pair of a rotated head's numbers (a, b) → those at the product's. (a, b) times its gradient is the
// norm's output times its own; the output is (a, b) rotated back, over cos² + sin², which rounded tables keep only
// near 1. mean: of that product, over the head.
__device__ __forceinline__ void pair_backward(float& da, float& db, float a, float b, float cosine, float sine,
                                              float mean, float factor) {
  const float share = quotient(mean, cosine * cosine + sine * sine);
  const float u = da - share * a, w = db - share * b;
  da = factor * (u * cosine - w * sine);
  db = factor * (w * cosine + u * sine);
}

// dx, the gradients at 16 rows of a rotated head → those at the product's rows. x(n, half_row) gives the rotated
// numbers that lie where dx[n][2·half_row] and the next do.
template <int kWidth, class X>
__device__ __forceinline__ void rows_backward(float (&dx)[kWidth / 8][4], const Angles<kWidth>& angles,
                                              const float (&factors)[2], X&& x) {
  constexpr int kTiles = Angles<kWidth>::kTiles;
#pragma unroll
  for (int half_row = 0; half_row < 2; ++half_row) {
    float dot = 0.0f;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      const float2 at = x(n, half_row);
      dot = fmaf(dx[n][2 * half_row + 1], at.y, fmaf(dx[n][2 * half_row], at.x, dot));
    }
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    const float mean = dot * (1.0f / kWidth);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 a = x(n, half_row), b = x(n + kTiles, half_row);
      const float2 c = angles.cosines[half_row][n], s = angles.sines[half_row][n];
      float *const da = &dx[n][2 * half_row], *const db = &dx[n + kTiles][2 * half_row];
      pair_backward(da[0], db[0], a.x, b.x, c.x, s.x, mean, factors[half_row]);
      pair_backward(da[1], db[1], a.y, b.y, c.y, s.y, mean, factors[half_row]);
    }
  }
}

}  // namespace pgolf::cuda
