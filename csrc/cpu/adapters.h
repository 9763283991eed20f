// Where the adapters of an operation's products lie in its tensor (backend.h), and their products.
#pragma once

#include "cpu/rows.h"

PGOLF_CPU_BEGIN

template <class T, int kProducts>
struct Adapters {
  T* numbers;  // null: none
  i64 rank, in, out[kProducts];

  // All a's of a sequence, [kProducts·rank, in]
  T* a(i64 sequence) const { return numbers + sequence * size(); }
  T* b(i64 sequence, int product) const {  // [out, rank]
    i64 at = kProducts * rank * in;
    for (int p = 0; p < product; ++p) at += rank * out[p];
    return a(sequence) + at;
  }
  i64 width() const { return kProducts * rank; }  // of u: what the products' a's give, side by side

  // u [rows, width] = n·aᵀ
  void down(i64 sequence, i64 rows, const T* n, T* u) const {
    gemm<T>(kPlain, kTransposed, rows, width(), in, n, in, a(sequence), in, kFromZero, u, width());
  }
  // y [rows, out] += u·bᵀ
  void up(i64 sequence, int product, i64 rows, const T* u, T* y) const {
    gemm<T>(kPlain, kTransposed, rows, out[product], rank, u + product * rank, width(), b(sequence, product), rank,
            kFromC, y, out[product]);
  }
  // du [rows, width], the product's part = dy·b
  void up_backward(i64 sequence, int product, i64 rows, const T* dy, i64 dy_stride, T* du) const {
    gemm<T>(kPlain, kPlain, rows, rank, out[product], dy, dy_stride, b(sequence, product), rank, kFromZero,
            du + product * rank, width());
  }
  // dn [rows, in] += du·a
  void down_backward(i64 sequence, i64 rows, const T* du, T* dn) const {
    gemm<T>(kPlain, kPlain, rows, in, width(), du, width(), a(sequence), in, kFromC, dn, in);
  }
  // On the gradients' tensor: the sequence's numbers ← 0; a += duᵀ·n; b += dyᵀ·u.
  void clear(i64 sequence) const {
    T* own = a(sequence);
    for (i64 i = 0; i < size(); ++i) own[i] = 0;
  }
  void a_gradient(i64 sequence, i64 rows, const T* du, const T* n) const {
    gemm_blocks<T>(kTransposed, kPlain, width(), in, rows, T(1), du, width(), n, in, a(sequence), in);
  }
  void b_gradient(i64 sequence, int product, i64 rows, const T* dy, i64 dy_stride, const T* u) const {
    gemm_blocks<T>(kTransposed, kPlain, out[product], rank, rows, T(1), dy, dy_stride, u + product * rank, width(),
                   b(sequence, product), rank);
  }

 private:
  i64 size() const {
    i64 all = kProducts * rank * in;
    for (i64 o : out) all += rank * o;
    return all;
  }
};

PGOLF_CPU_END
