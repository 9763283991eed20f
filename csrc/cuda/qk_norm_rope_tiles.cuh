// Norm and RoPE of q and k on accumulators, of which a warp holds 16 rows of a head (tiles.cuh's lane_row and
// lane_column), and what their backward needs of the forward.
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

// An order of a head's tiles of 8 numbers in which tile n and tile n + half are a pair of RoPE's, whether it turns
// whole heads or their first R ≤ D/2 numbers alone, which are pairs (j, j + R/2): there the partners of the first R/16
// tiles change places with those that stand where the partners of whole heads do. The others are turned by angles of 0.
// The order is its own inverse.
struct RopeOrder {
  int tiles = 0;  // R/16; 0: as they stand

  RopeOrder() = default;
  RopeOrder(i64 rope_dims, i64 D) : tiles(rope_dims && rope_dims < D ? static_cast<int>(rope_dims / 16) : 0) {
    require(tiles == 0 || (rope_dims % 16 == 0 && D % 16 == 0 && rope_dims <= D / 2), "RoPE turns ", rope_dims, " of ",
            D,
            " numbers of a head; the CUDA backend turns all, or a multiple of 16 that is at most half of a width that "
            "is one, too.");
  }
  __device__ __forceinline__ int operator()(int n, int half) const {
    if (n >= tiles && n < 2 * tiles) return n - tiles + half;
    return n >= half && n < half + tiles ? n - half + tiles : n;
  }
  // swap(a, b) for the tiles that change places, where tiles are registers: a and b are constants. (A loop over kCount
  // is not unrolled, and the registers become memory.)
  template <int kTiles, int kCount = 1, class F>
  __device__ __forceinline__ void exchange(F&& swap) const {
    if constexpr (kCount <= kTiles / 4) {
      if (tiles == kCount) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) swap(kCount + i, kTiles / 2 + i);
      }
      exchange<kTiles, kCount + 1>(swap);
    }
  }
  // The same for accumulators of kTiles tiles from the first-th on.
  template <int kTiles, int kAll>
  __device__ __forceinline__ void exchange_rows(float (&x)[kAll][4], int first = 0) const {
    exchange<kTiles>([&](int a, int b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float was = x[first + a][i];
        x[first + a][i] = x[first + b][i];
        x[first + b][i] = was;
      }
    });
  }
};

// HeadNorms for kernels; cos null: none.
struct QkNormRopeArgs {
  const float *cos, *sin, *q_factors, *k_factors;
  RopeOrder order;
};

// The angles of 16 rows of heads of 64 numbers in two tiles of shared memory, copied there by cp.async.
struct SharedAngles {
  using Rows = SharedTile<64>;  // 32 float32 numbers are as many bytes as 64 of 16 bits
  const unsigned char *cosines, *sines;

  // Rows past the last of `positions` are as the last. Complete after cp_async_wait_all and a __syncwarp.
  __device__ __forceinline__ void begin(const float* cos, const float* sin, int first, int positions) const {
#pragma unroll
    for (int i = 0; i < 16 * Rows::kChunks / kWarp; ++i) {
      const int index = i * kWarp + threadIdx.x % kWarp, row = index / Rows::kChunks, chunk = index % Rows::kChunks;
      const int from = min(first + row, positions - 1) * 32 + chunk * 4;
      cp_async_16(shared_address(cosines) + Rows::offset(row, chunk), cos + from, true);
      cp_async_16(shared_address(sines) + Rows::offset(row, chunk), sin + from, true);
    }
  }
  __device__ __forceinline__ float2 cosine(int n, int half_row) const { return at(cosines, n, half_row); }
  __device__ __forceinline__ float2 sine(int n, int half_row) const { return at(sines, n, half_row); }

 private:
  __device__ static float2 at(const unsigned char* tile, int n, int half_row) {
    const int column = n * 8 + lane_column(0);
    return *reinterpret_cast<const float2*>(tile + Rows::offset(lane_row(2 * half_row), column / 4) + column % 4 * 4);
  }
};

// x / y, rounded as by the operator, for y from 2⁻²⁰ to 2²⁰ and x that is 0 or from 2⁻¹⁰⁰ to 2¹⁰⁰: without the
// operator's branch for other numbers, which serialises divisions. A smaller x may be off in its last bits; an infinite
// one gives NaN.
__device__ __forceinline__ float quotient(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  inverse = fmaf(inverse, fmaf(-y, inverse, 1.0f), inverse);
  const float near = x * inverse;
  return fmaf(inverse, fmaf(-y, near, x), near);
}

// The gradients at a pair of a rotated head's numbers (a, b) → those at the GEMM's output. (a, b) times its gradient is
// the norm's output times its own; the output is (a, b) rotated back, over cos² + sin², which rounded tables keep only
// near 1. share: the mean of that product over the head, over cos² + sin².
__device__ __forceinline__ void pair_backward(float& da, float& db, float a, float b, float cosine, float sine,
                                              float share, float factor) {
  const float u = da - share * a, w = db - share * b;
  da = factor * (u * cosine - w * sine);
  db = factor * (w * cosine + u * sine);
}

// Sums of x⊙dx of 16 rows of a head: a lane's part of its two rows, and those of the whole rows. x(n, half_row) gives
// the numbers that lie where dx[n][2·half_row] and the next do.
template <int kTiles, class X>
__device__ __forceinline__ void row_dots(float (&dots)[2], const float (&dx)[kTiles][4], X&& x) {
#pragma unroll
  for (int half_row = 0; half_row < 2; ++half_row) {
    dots[half_row] = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 at = x(n, half_row);
      dots[half_row] = fmaf(dx[n][2 * half_row + 1], at.y, fmaf(dx[n][2 * half_row], at.x, dots[half_row]));
    }
    dots[half_row] += __shfl_xor_sync(0xffffffffu, dots[half_row], 1);
    dots[half_row] += __shfl_xor_sync(0xffffffffu, dots[half_row], 2);
  }
}

// dx, the gradients at 16 rows of a rotated head → those at the GEMM's output, both with their tiles in RopeOrder, as
// x's are; otherwise x is as above. dots: of the whole rows. Both may lack a factor, that factors have. For gradients
// that are rounded to 16 bits: the quotient may miss by its last bits.
template <int kTiles, class X>
__device__ __forceinline__ void rows_backward(float (&dx)[kTiles][4], const float (&dots)[2],
                                              const SharedAngles& angles, const float (&factors)[2], X&& x) {
#pragma unroll
  for (int half_row = 0; half_row < 2; ++half_row) {
    const float mean = dots[half_row] * (1.0f / (8 * kTiles)), factor = factors[half_row];
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      const float2 a = x(n, half_row), b = x(n + kTiles / 2, half_row);
      const float2 c = angles.cosine(n, half_row), s = angles.sine(n, half_row);
      float *const da = &dx[n][2 * half_row], *const db = &dx[n + kTiles / 2][2 * half_row];
      pair_backward(da[0], db[0], a.x, b.x, c.x, s.x, __fdividef(mean, fmaf(c.x, c.x, s.x * s.x)), factor);
      pair_backward(da[1], db[1], a.y, b.y, c.y, s.y, __fdividef(mean, fmaf(c.y, c.y, s.y * s.y)), factor);
    }
  }
}

}  // namespace pgolf::cuda
