// Arguments of the three GEMMs of a linear layer y = x·wᵀ: x [rows, in], w [out, in], y [rows, out].
#pragma once

#include "cuda/cuda_backend.h"

namespace pgolf::cuda {

struct Linear {
  DType S;  // of x, w and dy
  i64 rows, in, out;
  i64 y_stride = out;  // elements from a row of y or dy to the next

  Gemm forward(const void* x, const void* w, void* y, DType y_type) const {
    Gemm product{.transpose_b = true, .m = rows, .n = out, .k = in};
    product.a = x;
    product.lda = product.ldb = in;
    product.b = w;
    product.d = y;
    product.ldd = y_stride;
    product.in = S;
    product.out = y_type;
    return product;
  }
  // dx = dy·w
  Gemm backward(const void* dy, const void* w, void* dx) const {
    Gemm product{.m = rows, .n = in, .k = out};
    product.a = dy;
    product.lda = y_stride;
    product.b = w;
    product.d = dx;
    product.ldb = product.ldd = in;
    product.in = product.out = S;
    return product;
  }
  // dw += dyᵀ·x, float32
  Gemm weights(const void* dy, const void* x, void* dw) const {
    Gemm product{.transpose_a = true, .m = out, .n = in, .k = rows};
    product.a = dy;
    product.lda = y_stride;
    product.b = x;
    product.d = dw;
    product.ldb = product.ldd = in;
    product.in = S;
    product.beta = 1.0f;
    return product;
  }
};

}  // namespace pgolf::cuda
