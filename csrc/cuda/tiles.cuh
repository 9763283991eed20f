// A warp's MMA fragments and accumulators in registers, and tiles of 16-bit rows in shared memory.
#pragma once

#include "cuda/mma.cuh"

namespace pgolf::cuda {

// Rows of 16-byte chunks, permuted within a row so that eight rows of one column of chunks lie in different banks.
template <int kWidth>
struct SharedTile {
  static_assert(kWidth % 16 == 0);
  static constexpr int kChunks = kWidth / kVector;
  static constexpr int kRowBytes = kChunks * 16;
  static constexpr int kSpread = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // gcd(kChunks, 8)
  static constexpr int bytes(int rows) { return rows * kRowBytes; }
  static __host__ __device__ constexpr int permutation(int row) { return row / (8 / kSpread) % kSpread; }
  static __host__ __device__ constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ permutation(row)) * 16;
  }
};

template <int kRowTiles, int kColumns>
using Accumulator = float[kRowTiles][kColumns / 8][4];
template <int kRowTiles, int kWidth>
using Fragments = unsigned[kRowTiles][kWidth / 16][4];

// Where a lane's numbers of a 16×8 result lie.
__device__ __forceinline__ int lane_row(int element) { return threadIdx.x % kWarp / 4 + element / 2 * 8; }
__device__ __forceinline__ int lane_column(int element) { return threadIdx.x % 4 * 2 + element % 2; }

// Two results side by side, rounded: an A fragment (mma.cuh).
template <class S>
__device__ __forceinline__ void round_fragment(unsigned (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<S>(left[0], left[1]);
  a[1] = pack<S>(left[2], left[3]);
  a[2] = pack<S>(right[0], right[1]);
  a[3] = pack<S>(right[2], right[3]);
}
template <class S, int kColumns>
__device__ __forceinline__ void round_fragments(unsigned (&a)[kColumns / 16][4], const float (&c)[kColumns / 8][4]) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) round_fragment<S>(a[k], c[2 * k], c[2 * k + 1]);
}

// Rounds a warp's rows into `tile`: shared memory for these rows that no other warp uses.
template <class S, int kWidth, int kRowTiles>
__device__ __forceinline__ void round_rows(unsigned char* tile, const Accumulator<kRowTiles, kWidth>& x) {
  using Tile = SharedTile<kWidth>;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        *reinterpret_cast<unsigned*>(tile + Tile::offset(16 * r + lane_row(i), n) + lane_column(i) * sizeof(S)) =
            pack<S>(x[r][n][i], x[r][n][i + 1]);
  __syncwarp();
}

struct AsTheyStand {
  __device__ __forceinline__ int operator()(int chunk) const { return chunk; }
};

// Rounds a warp's rows and writes them to rows [first, first + kRowTiles·16) of T, D numbers of each, by way of `tile`.
// place(n): where in a row its n-th eight numbers belong.
template <class S, int kWidth, int kRowTiles, class Place = AsTheyStand>
__device__ __forceinline__ void store_rows(unsigned char* tile, const Accumulator<kRowTiles, kWidth>& x, S* rows,
                                           int stride, int first, int T, int D, Place place = {}) {
  using Tile = SharedTile<kWidth>;
  round_rows<S, kWidth, kRowTiles>(tile, x);
#pragma unroll
  for (int i = 0; i < kRowTiles * 16 * Tile::kChunks / kWarp; ++i) {
    const unsigned index = i * kWarp + threadIdx.x % kWarp;
    const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
    if (first + row < T && chunk * kVector < D)
      *reinterpret_cast<uint4*>(rows + ((first + row) * stride + place(chunk) * kVector)) =
          *reinterpret_cast<const uint4*>(tile + Tile::offset(row, chunk));
  }
}

}  // namespace pgolf::cuda
