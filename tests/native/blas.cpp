// Matrix products under the names of the scipy-openblas32 wheel, in the plainest form: the wheel exists for no machine
// that a cross-compiler builds for here. What is tested is pgolf's own code; products are slow and right.
#include <cstddef>

namespace {

constexpr int kTransposed = 112, kLower = 122;

template <class T>
void multiply(int trans_a, int trans_b, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta,
              T* c, int ldc) {
  const auto at = [](const T* x, int ld, int trans, int row, int col) {
    return trans == kTransposed ? x[static_cast<std::ptrdiff_t>(col) * ld + row]
                                : x[static_cast<std::ptrdiff_t>(row) * ld + col];
  };
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      T sum = 0;
      for (int l = 0; l < k; ++l) sum += at(a, lda, trans_a, i, l) * at(b, ldb, trans_b, l, j);
      T& out = c[static_cast<std::ptrdiff_t>(i) * ldc + j];
      out = alpha * sum + (beta == 0 ? T(0) : beta * out);  // with beta 0 what stands there may be NaN
    }
}

template <class T>
void multiply_symmetric(int uplo, int n, int k, T alpha, const T* a, int lda, T beta, T* c, int ldc) {
  for (int i = 0; i < n; ++i)
    for (int j = uplo == kLower ? 0 : i; j < (uplo == kLower ? i + 1 : n); ++j)
      multiply<T>(0, kTransposed, 1, 1, k, alpha, a + static_cast<std::ptrdiff_t>(i) * lda, lda,
                  a + static_cast<std::ptrdiff_t>(j) * lda, lda, beta, c + static_cast<std::ptrdiff_t>(i) * ldc + j,
                  ldc);
}

}  // namespace

extern "C" {
void scipy_openblas_set_num_threads(int) {}
void scipy_cblas_sgemm(int, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc) {
  multiply(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void scipy_cblas_dgemm(int, int trans_a, int trans_b, int m, int n, int k, double alpha, const double* a, int lda,
                       const double* b, int ldb, double beta, double* c, int ldc) {
  multiply(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void scipy_cblas_ssyrk(int, int uplo, int, int n, int k, float alpha, const float* a, int lda, float beta, float* c,
                       int ldc) {
  multiply_symmetric(uplo, n, k, alpha, a, lda, beta, c, ldc);
}
void scipy_cblas_dsyrk(int, int uplo, int, int n, int k, double alpha, const double* a, int lda, double beta, double* c,
                       int ldc) {
  multiply_symmetric(uplo, n, k, alpha, a, lda, beta, c, ldc);
}
}
