// The matrices that Muon updates, the tiles in which kernels transpose them, and a launch's numbering of its blocks.
#pragma once

#include "cuda/iteration_tiles.h"
#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {

using MuonElements = Elements<4>;

// A weight [rows, cols] and its update X, which lies wide, [r, c] with r ≤ c: transposed where the weight is tall. Both
// sides of X are padded with zeros to multiples of 8, which its GEMMs keep at zero and which aligns every row to 16
// bytes.
struct MuonMatrix {
  float* w;
  const float* grad;
  float* momentum;
  void* x;           // S [padded_r, padded_c]
  double* partials;  // [kThreads], of which pieces() are written; then float row_factors [rows]
  int rows, cols;

  __host__ __device__ bool tall() const { return rows > cols; }
  __host__ __device__ int padded_r() const { return padded(tall() ? cols : rows); }
  __host__ __device__ int padded_c() const { return padded(tall() ? rows : cols); }
  __host__ __device__ i64 size() const { return i64{rows} * cols; }
  // Elements that one block squares, whole rows where rows are normalised, and how many blocks that takes: at most
  // kThreads.
  __host__ __device__ i64 piece(bool whole_rows) const {
    const i64 unit = whole_rows ? cols : MuonElements::kChunk;
    return ((size() + kThreads - 1) / kThreads + unit - 1) / unit * unit;
  }
  __host__ __device__ int pieces(bool whole_rows) const {
    return static_cast<int>((size() + piece(whole_rows) - 1) / piece(whole_rows));
  }
  __host__ __device__ float* row_factors() const { return reinterpret_cast<float*>(partials + kThreads); }
  static i64 scratch_doubles(i64 rows) { return kThreads + (rows + 1) / 2; }

 private:
  __host__ __device__ static int padded(int side) { return (side + kVector - 1) / kVector * kVector; }
};
using MuonMatrices = TensorList<MuonMatrix>;

// A square tile of X and the tile of the weight that it updates: a transposition's two sides. In shared memory it is
// laid out as the weight is; the odd stride avoids bank conflicts.
struct MuonTile {
  static constexpr int kSide = 64;
  static constexpr int kStride = kSide + 1;
  static constexpr int kVectors = kSide * kSide / kVector / kThreads;  // of X, a thread
  static constexpr int kQuads = kSide * kSide / 4 / kThreads;          // of the weight, a thread

  bool tall;
  int rows, cols;              // of the weight
  int padded_r, padded_c;      // of X
  int x_row, x_col, row, col;  // the corners

  __device__ MuonTile(const MuonMatrix& matrix, unsigned block)
      : tall(matrix.tall()),
        rows(matrix.rows),
        cols(matrix.cols),
        padded_r(matrix.padded_r()),
        padded_c(matrix.padded_c()) {
    const int across = (padded_c + kSide - 1) / kSide, index = static_cast<int>(block);
    x_row = index / across * kSide;
    x_col = index % across * kSide;
    row = tall ? x_col : x_row;
    col = tall ? x_row : x_col;
  }

  static i64 count(const MuonMatrix& matrix) {
    return i64{blocks_for(matrix.padded_r(), kSide)} * blocks_for(matrix.padded_c(), kSide);
  }

  // Thread's vector v: eight numbers of X from (a, b) of the square on, and where they lie in shared memory.
  static __device__ int vector_row(int v) { return (v * kThreads + threadIdx.x) / (kSide / kVector); }
  static __device__ int vector_col(int v) { return (v * kThreads + threadIdx.x) % (kSide / kVector) * kVector; }
  __device__ bool holds(int a, int b) const { return x_row + a < padded_r && x_col + b < padded_c; }
  __device__ i64 x_index(int a, int b) const { return i64{x_row + a} * padded_c + (x_col + b); }
  __device__ int shared_index(int a, int b) const { return tall ? b * kStride + a : a * kStride + b; }

  // Thread's quad q: four neighbours of a row of the weight's square.
  static __device__ int quad_row(int q) { return (q * kThreads + threadIdx.x) / (kSide / 4); }
  static __device__ int quad_col(int q) { return (q * kThreads + threadIdx.x) % (kSide / 4) * 4; }

  __device__ float4 load_quad(const float* from, int q) const {
    const int i = row + quad_row(q), j = col + quad_col(q);
    if (i >= rows || j >= cols) return make_float4(0, 0, 0, 0);
    const float* at = from + (i64{i} * cols + j);
    if (cols % 4 == 0) return *reinterpret_cast<const float4*>(at);
    return make_float4(at[0], j + 1 < cols ? at[1] : 0, j + 2 < cols ? at[2] : 0, j + 3 < cols ? at[3] : 0);
  }
  __device__ void store_quad(float* to, int q, const float4& x) const {
    const int i = row + quad_row(q), j = col + quad_col(q);
    if (i >= rows || j >= cols) return;
    float* at = to + (i64{i} * cols + j);
    if (cols % 4 == 0) {
      *reinterpret_cast<float4*>(at) = x;
    } else {
      at[0] = x.x;
      if (j + 1 < cols) at[1] = x.y;
      if (j + 2 < cols) at[2] = x.z;
      if (j + 3 < cols) at[3] = x.w;
    }
  }
};

// All matrices of a launch that makes X, and the blocks at which its steps begin.
struct Preparation {
  static constexpr int kMatrices = 70;
  MuonMatrix matrices[kMatrices];
  unsigned first[2 * kMatrices];
  int count = 0;
  unsigned blocks = 0;
  bool normalize_rows = false;

  void number() {
    blocks = 0;
    for (int i = 0; i < 2 * count; ++i) {
      const PreparationStep step = preparation_step(i, count);
      const MuonMatrix& matrix = matrices[step.matrix];
      first[i] = blocks;
      blocks += step.normalizes ? static_cast<unsigned>(MuonTile::count(matrix))
                                : static_cast<unsigned>(matrix.pieces(normalize_rows));
    }
  }
};
static_assert(sizeof(Preparation) <= kParameterBytes);

}  // namespace pgolf::cuda
