// Tiles of 16-bit rows in shared memory and a warp's MMA with them: the building blocks of attention on tensor cores.
//
// A warp has kRowTiles·16 rows as fragments in registers; tiles of the rows that it is multiplied with lie in shared
// memory, kWidth columns wide: D rounded up to 16. Columns from D on and rows from T on are zeros there, so that they
// change no sum.
#pragma once

#include <cfloat>

#include "cuda/attention.cuh"
#include "cuda/mma.cuh"
#include "cuda/tiles.cuh"

namespace pgolf::cuda {

inline constexpr unsigned kSignBits = 0x80008000u;  // of a pair of 16-bit numbers

// A score's factor before exp2, never 0, so that −∞ stays −∞.
__device__ __forceinline__ float softmax_scale_log2(float gain, float root) {
  const float scale = gain * root * 1.44269504088896340736f;  // log₂ e
  return fabsf(scale) < FLT_MIN ? copysignf(FLT_MIN, scale) : scale;
}

// Sets the scores of keys after their query to `hidden`. Rows are queries and columns keys, or the other way round.
template <bool kRowsAreKeys, int kRowTiles, int kColumns>
__device__ __forceinline__ void causal_mask(Accumulator<kRowTiles, kColumns>& s, int first_row, int first_column,
                                            float hidden) {
  const int last = kRowsAreKeys ? first_row + kRowTiles * 16 - 1 : first_column + kColumns - 1;
  if (last <= (kRowsAreKeys ? first_column : first_row)) return;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 16 * r + lane_row(i), column = first_column + 8 * n + lane_column(i);
        if (kRowsAreKeys ? row > column : column > row) s[r][n][i] = hidden;
      }
}

// Rows [first, first + kRows) of a head, `stride` elements from each to the next, D of them in a row. A group of lanes
// takes a row, so that a thread's addresses are one address plus multiples of the stride.
template <class S, int kWidth, int kRows, int kThreads>
__device__ __forceinline__ void load_tile(unsigned tile, const S* head, int stride, int first, int T, int D) {
  using Tile = SharedTile<kWidth>;
  constexpr int kLanes = Tile::kSpread, kPass = kThreads / kLanes;
  static_assert(kRows % kPass == 0 && kPass % 8 == 0);
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const S* from = head + ((first + row) * stride + lane * kVector);
  const unsigned to = tile + Tile::offset(row, lane);
#pragma unroll
  for (int i = 0; i < kRows; i += kPass)
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes)
      cp_async_16(to + Tile::bytes(i) + chunk * 16, from + (i * stride + chunk * kVector),
                  first + row + i < T && (chunk + lane) * kVector < D);
}

// The fragments of the kRowTiles·16 rows from `row` on.
template <int kWidth, int kRowTiles>
__device__ __forceinline__ void load_fragments(Fragments<kRowTiles, kWidth>& a, unsigned tile, int row) {
  using Tile = SharedTile<kWidth>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k)
      ldmatrix_x4(a[r][k], tile + Tile::offset(row + 16 * r + lane % 16, 2 * k + lane / 16));
}

// s = a·tileᵀ for kColumns rows of the tile, the first of which is a multiple of 8.
template <class S, int kWidth, int kRowTiles, int kColumns>
__device__ __forceinline__ void multiply_transposed(Accumulator<kRowTiles, kColumns>& s,
                                                    const Fragments<kRowTiles, kWidth>& a, unsigned tile) {
  using Tile = SharedTile<kWidth>;
  const int lane = threadIdx.x % kWarp, row = lane % 8 + lane / 16 * 8;
  const unsigned lane_tile = tile + row * Tile::kRowBytes, lane_chunk = lane / 8 % 2 ^ Tile::permutation(row);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[r][n][i] = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k)
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      unsigned b[4];
      ldmatrix_x4(b, lane_tile + n * Tile::bytes(16) + (2 * k ^ lane_chunk) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<S>(s[r][2 * n], a[r][k], b[0], b[1]);
        mma_m16n8k16<S>(s[r][2 * n + 1], a[r][k], b[2], b[3]);
      }
    }
}

// sum += round(p)·tile for kColumns rows of the tile, the first of which is a multiple of 8.
template <class S, int kWidth, int kRowTiles, int kColumns>
__device__ __forceinline__ void multiply_accumulate(Accumulator<kRowTiles, kWidth>& sum,
                                                    const Accumulator<kRowTiles, kColumns>& p, unsigned tile) {
  using Tile = SharedTile<kWidth>;
  const int lane = threadIdx.x % kWarp, row = lane % 16;
  const unsigned lane_tile = tile + row * Tile::kRowBytes, lane_chunk = lane / 16 ^ Tile::permutation(row);
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    unsigned a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) round_fragment<S>(a[r], p[r][2 * k], p[r][2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kWidth / 16; ++n) {
      unsigned b[4];
      ldmatrix_x4_trans(b, lane_tile + k * Tile::bytes(16) + (2 * n ^ lane_chunk) * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<S>(sum[r][2 * n], a[r], b[0], b[1]);
        mma_m16n8k16<S>(sum[r][2 * n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// The end of an online softmax: divides o by row_sum, of which each lane has its columns' part, and writes the
// log-sum-exp of the rows from `first` on; row_max is a row's greatest product.
template <int kRowTiles, int kWidth>
__device__ __forceinline__ void finalize_softmax(Accumulator<kRowTiles, kWidth>& o,
                                                 const float (&row_max)[kRowTiles][2],
                                                 const float (&row_sum)[kRowTiles][2], float scale, float* lse,
                                                 int first, int queries) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      float total = row_sum[r][half_row];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = 1.0f / total;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
        for (int i = 2 * half_row; i < 2 * half_row + 2; ++i) {
          // The quotient with one Newton step: exact where it can be, as it must be for equal probabilities.
          const float quotient = o[r][n][i] * inverse;
          o[r][n][i] = fmaf(fmaf(-quotient, total, o[r][n][i]), inverse, quotient);
        }
      const int query = first + 16 * r + lane_row(2 * half_row);
      if (lane_column(0) == 0 && query < queries) lse[query] = fmaf(row_max[r][half_row], scale, log2f(total));
    }
}

// Calls body(std::integral_constant<int, kWidth>) with a head width rounded up to 16.
template <class F>
decltype(auto) with_width(int D, F&& body) {
  switch ((D + 15) / 16) {
    case 2:
      return body(std::integral_constant<int, 32>{});
    case 3:
      return body(std::integral_constant<int, 48>{});
    case 4:
      return body(std::integral_constant<int, 64>{});
    case 5:
      return body(std::integral_constant<int, 80>{});
    case 6:
      return body(std::integral_constant<int, 96>{});
    case 7:
      return body(std::integral_constant<int, 112>{});
    default:
      return body(std::integral_constant<int, 128>{});
  }
}

}  // namespace pgolf::cuda
