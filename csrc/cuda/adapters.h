// Arguments of the low-rank GEMMs of an operation's adapters (backend.h), each batched over the sequences.
#pragma once

#include "cuda/cuda_backend.h"

namespace pgolf::cuda {

template <int kProducts>
struct Adapters {
  DType S;
  i64 sequences, rows, rank, in;  // rows of each sequence
  i64 out[kProducts];

  i64 width() const { return kProducts * rank; }  // of u: what the products' a's give, side by side
  i64 size() const { return b_at(kProducts); }    // of a sequence's numbers
  i64 b_at(int product) const {                   // where the product's b begins
    i64 at = width() * in;
    for (int p = 0; p < product; ++p) at += rank * out[p];
    return at;
  }

  // u [rows, width] = n·aᵀ
  Gemm down(const void* n, const void* adapters, void* u) const {
    Gemm p = product(rows, width(), in);
    p.transpose_b = true;
    first(p, n, in);
    second(p, adapters, 0, in);
    result(p, u, 0, width(), rows * width(), S);
    return p;
  }
  // y [rows, y_stride] += u·bᵀ
  Gemm up(int index, const void* u, const void* adapters, void* y, i64 y_stride, DType y_type) const {
    Gemm p = product(rows, out[index], rank);
    p.transpose_b = true;
    first(p, at(u, index * rank), width());
    second(p, adapters, b_at(index), rank);
    result(p, y, 0, y_stride, rows * y_stride, y_type);
    p.beta = 1.0f;
    return p;
  }
  // du [rows, width], the product's part = dy·b
  Gemm up_backward(int index, const void* dy, i64 dy_stride, const void* adapters, void* du) const {
    Gemm p = product(rows, rank, out[index]);
    first(p, dy, dy_stride);
    second(p, adapters, b_at(index), rank);
    result(p, du, index * rank, width(), rows * width(), S);
    return p;
  }
  // dn [rows, in] += du·a
  Gemm down_backward(const void* du, const void* adapters, void* dn) const {
    Gemm p = product(rows, in, width());
    first(p, du, width());
    second(p, adapters, 0, in);
    result(p, dn, 0, in, rows * in, S);
    p.beta = 1.0f;
    return p;
  }
  // On the gradients' tensor, float32: a = duᵀ·n, b = dyᵀ·u
  Gemm a_gradient(const void* du, const void* n, void* gradients) const {
    return gradient(width(), in, du, width(), n, in, gradients, 0);
  }
  Gemm b_gradient(int index, const void* dy, i64 dy_stride, const void* u, void* gradients) const {
    return gradient(out[index], rank, dy, dy_stride, at(u, index * rank), width(), gradients, b_at(index));
  }

 private:
  const void* at(const void* base, i64 elements) const {
    return static_cast<const char*>(base) + static_cast<std::size_t>(elements) * size_of(S);
  }
  Gemm product(i64 m, i64 n, i64 k) const {
    Gemm p{.m = m, .n = n, .k = k};
    p.in = S;
    p.count = sequences;
    return p;
  }
  void first(Gemm& p, const void* a, i64 stride) const {
    p.a = a;
    p.lda = stride;
    p.a_step = rows * stride;
  }
  void second(Gemm& p, const void* adapters, i64 from, i64 stride) const {
    p.b = at(adapters, from);
    p.ldb = stride;
    p.b_step = size();
  }
  static void result(Gemm& p, void* d, i64 from, i64 stride, i64 step, DType type) {
    p.d = static_cast<char*>(d) + static_cast<std::size_t>(from) * size_of(type);
    p.ldd = stride;
    p.d_step = step;
    p.out = type;
  }
  Gemm gradient(i64 m, i64 n, const void* y, i64 y_stride, const void* x, i64 x_stride, void* gradients,
                i64 from) const {
    Gemm p = product(m, n, rows);
    p.transpose_a = true;
    first(p, y, y_stride);
    p.b = x;
    p.ldb = x_stride;
    p.b_step = rows * x_stride;
    result(p, gradients, from, n, size(), DType::f32);
    return p;
  }
};

}  // namespace pgolf::cuda
