// Matrix products. OpenBLAS runs each on the calling thread only; pgolf's pool cuts the work, by shape alone.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "cpu/isa.h"

extern "C" {  // the scipy-openblas32 wheel's names, from its cblas.h
void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);
void scipy_cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double* a, int lda,
                       const double* b, int ldb, double beta, double* c, int ldc);
void scipy_cblas_ssyrk(int order, int uplo, int trans, int n, int k, float alpha, const float* a, int lda, float beta,
                       float* c, int ldc);
void scipy_cblas_dsyrk(int order, int uplo, int trans, int n, int k, double alpha, const double* a, int lda,
                       double beta, double* c, int ldc);
}

PGOLF_CPU_BEGIN

using i64 = std::int64_t;

enum Transpose : int { kPlain = 111, kTransposed = 112 };  // CBLAS_TRANSPOSE

// C[m,n] = alpha·op(A)[m,k]·op(B)[k,n] + beta·C, row-major, on this thread.
template <class T>
void gemm(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, T alpha, const T* a, i64 lda, const T* b, i64 ldb, T beta,
          T* c, i64 ldc) {
  constexpr int row_major = 101;
  const auto i = [](i64 v) { return static_cast<int>(v); };
  if constexpr (sizeof(T) == 4)
    scipy_cblas_sgemm(row_major, ta, tb, i(m), i(n), i(k), alpha, a, i(lda), b, i(ldb), beta, c, i(ldc));
  else
    scipy_cblas_dgemm(row_major, ta, tb, i(m), i(n), i(k), alpha, a, i(lda), b, i(ldb), beta, c, i(ldc));
}

// C[n,n] = alpha·A[n,k]·Aᵀ, both triangles: half the work of a product.
template <class T>
void gemm_symmetric(i64 n, i64 k, T alpha, const T* a, i64 lda, T* c) {
  constexpr int row_major = 101, lower = 122;
  const auto i = [](i64 v) { return static_cast<int>(v); };
  if constexpr (sizeof(T) == 4)
    scipy_cblas_ssyrk(row_major, lower, kPlain, i(n), i(k), alpha, a, i(lda), 0, c, i(n));
  else
    scipy_cblas_dsyrk(row_major, lower, kPlain, i(n), i(k), alpha, a, i(lda), 0, c, i(n));
  constexpr i64 kTile = 32;  // mirror tile by tile, so that both sides stay in cache
  for (i64 r0 = 0; r0 < n; r0 += kTile)
    for (i64 c0 = 0; c0 <= r0; c0 += kTile)
      for (i64 r = r0; r < n && r < r0 + kTile; ++r)
        for (i64 j = c0; j < r && j < c0 + kTile; ++j) c[j * n + r] = c[r * n + j];
}

// w[rows, cols] += alpha·yᵀ[rows, m]·x[m, cols]
template <class T>
struct WeightGradient {
  const T* y;
  i64 stride, rows;  // of y
  T* w;
};

// Weight gradients that share x, their outputs cut into tiles over the pool. Tiles are as tall as leaves several of
// them: OpenBLAS reaches 94, 139, 164 GFLOP/s at heights of 32, 64, 128 where 181 is its best.
template <class T, int kCount>
void gemm_weight_gradients(i64 m, i64 cols, T alpha, const T* x, const WeightGradient<T> (&parts)[kCount]) {
  constexpr i64 kMaxCols = 512;
  const auto tile_rows = [](const WeightGradient<T>& part) { return part.rows >= 512 ? i64{128} : i64{64}; };
  const auto row_tiles = [&](const WeightGradient<T>& part) {
    return (part.rows + tile_rows(part) - 1) / tile_rows(part);
  };
  const i64 col_tiles = (cols + kMaxCols - 1) / kMaxCols;
  i64 all = 0;
  for (const auto& part : parts) all += row_tiles(part) * col_tiles;
  parallel_for(all, [&](i64 task) {
    int index = 0;
    while (task >= row_tiles(parts[index]) * col_tiles) task -= row_tiles(parts[index++]) * col_tiles;
    const WeightGradient<T>& part = parts[index];
    const i64 step = tile_rows(part), r = task / col_tiles * step, c = task % col_tiles * kMaxCols;
    const i64 height = part.rows - r < step ? part.rows - r : step;
    const i64 width = cols - c < kMaxCols ? cols - c : kMaxCols;
    gemm<T>(kTransposed, kPlain, height, width, m, alpha, part.y + r, part.stride, x + c, cols, T(1),
            part.w + r * cols + c, cols);
  });
}

PGOLF_CPU_END
