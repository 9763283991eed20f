// Norm and RoPE of the heads of q and k, and what their backward needs: Qkv's first, Attention's last step.
#pragma once

#include "cpu/rows.h"

PGOLF_CPU_BEGIN

// The beginning of what Qkv saves: rms factors of N inputs, and of heads.
template <class T>
struct HeadFactors {
  T *input, *q, *k;
  HeadFactors(Layout& layout, i64 N, i64 query_heads, i64 key_heads)
      : input(layout.take<T>(N)), q(layout.take<T>(query_heads)), k(layout.take<T>(key_heads)) {}
};

// Head rows [heads, D] of one token: norm, then rotate their first R numbers, in place.
template <class T>
PGOLF_INLINE void norm_rotate(T* x, i64 heads, i64 D, i64 R, const T* cos, const T* sin, T* factor) {
  for (i64 h = 0; h < heads; ++h, x += D) {
    factor[h] = rms_row(x, D, x);
    T *a = x, *b = x + R / 2;
    PGOLF_SIMD
    for (i64 j = 0; j < R / 2; ++j) {
      const T u = a[j], w = b[j];
      a[j] = u * cos[j] + w * sin[j];
      b[j] = w * cos[j] - u * sin[j];
    }
  }
}

// dx: gradient after the rotation → gradient before the norm, in place. x holds the rotated values, whose product
// with dx is that of the norm's output and its gradient; the output itself is x rotated back, over cos² + sin²,
// which rounded tables (rope_tables = bf16) keep only near 1.
template <class T>
PGOLF_INLINE void norm_rotate_backward(const T* x, T* dx, i64 heads, i64 D, i64 R, const T* cos, const T* sin,
                                       const T* factor) {
  for (i64 h = 0; h < heads; ++h, x += D, dx += D) {
    const T mean = dot(x, dx, D) / T(D);
    const T *a = x, *b = x + R / 2;
    T *da = dx, *db = dx + R / 2;
    PGOLF_SIMD
    for (i64 j = 0; j < R / 2; ++j) {
      const T share = mean / (cos[j] * cos[j] + sin[j] * sin[j]);
      const T u = da[j] - share * a[j], w = db[j] - share * b[j];
      da[j] = factor[h] * (u * cos[j] - w * sin[j]);
      db[j] = factor[h] * (w * cos[j] + u * sin[j]);
    }
    PGOLF_SIMD
    for (i64 j = R; j < D; ++j) dx[j] = factor[h] * (dx[j] - mean * x[j]);
  }
}

PGOLF_CPU_END
