// Matrix products, row-major, each whole on the calling thread; the pool cuts the work (rows.h).
//
// The order of sums is a rule (docs/spec.md, "Order of sums"): an element is one accumulator that takes k ascending, in
// every kernel and at every edge. So an element's bits depend on its own row of A and column of B alone: neither on the
// height or the place of what is computed with it nor on how the work is cut.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

PGOLF_CPU_BEGIN

using i64 = std::int64_t;

enum Transpose : bool { kPlain, kTransposed };

// What an element's accumulator starts from: 0, or what stands in C.
enum Start : bool { kFromZero, kFromC };

// C[m,n] = op(A)[m,k]·op(B)[k,n] (+ C). A matrix is plain as it stands here, or stored transposed.
template <class T>
void gemm(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, Start start, T* c,
          i64 ldc);

// Sums over tokens: C[m,n] += alpha·op(A)[m,k]·op(B)[k,n], a block of kSumBlock of k after the other; a block's chain
// starts from 0, and what it gives, times alpha, is added to C.
inline constexpr i64 kSumBlock = 512;
template <class T>
void gemm_blocks(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, T alpha, const T* a, i64 lda, const T* b, i64 ldb,
                 T* c, i64 ldc);

// C[n,n] = A[n,k]·Aᵀ, both triangles: half the work of a product, and its bits.
template <class T>
void gemm_symmetric(i64 n, i64 k, const T* a, i64 lda, T* c);

// A right-hand side laid out as kernels read it: panels of panel_width columns, k by k. Worth it where many rows share
// it.
template <class T>
i64 panel_width();
template <class T>
i64 panels_of(i64 n) {
  return (n + panel_width<T>() - 1) / panel_width<T>();
}
template <class T>
i64 packed_size(i64 n, i64 k) {
  return panels_of<T>(n) * panel_width<T>() * k;
}
// Panel `index` of op(B)[k,n] to its place in `packed`.
template <class T>
void pack_panel(Transpose tb, i64 n, i64 k, const T* b, i64 ldb, i64 index, T* packed);

// C[m,n] = A[m,k]·B (+ C), B packed
template <class T>
void gemm_packed(i64 m, i64 n, i64 k, const T* a, i64 lda, const T* packed, Start start, T* c, i64 ldc);

// A block of gemm_blocks: C[m,n] += alpha·(Aᵀ[m,k]·B), k ≤ kSumBlock, B packed
template <class T>
void gemm_packed_block(i64 m, i64 n, i64 k, T alpha, const T* a, i64 lda, const T* packed, T* c, i64 ldc);

PGOLF_CPU_END
