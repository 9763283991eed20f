// One vector register of T on the instruction set that this file is compiled for, as far as matrix products need it.
// multiply_add is one fused operation on AVX-512, AVX2 and NEON, whose products therefore agree to the bit; SSE2, the
// plain x86-64, has none, multiplies and then adds.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/tensor.h"
#include "cpu/isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define PGOLF_SSE2
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#define PGOLF_NEON
#endif

PGOLF_CPU_BEGIN

// Members of every Vec<T>: kLanes; zero, load, store; load_first and store_first touch the first `count` (1 … kLanes)
// numbers only, the others are read as 0; multiply_add(a, b, c) = a·b + c; repeat(p) has *p in every lane.
// transpose(rows, out, step): out[j·step + i] = rows[i][j] for i, j < kLanes.
template <class T>
struct Vec;

#if defined(__AVX512F__)

// Shuffles are written with masks of all lanes: gcc 12 warns of the unmasked ones' undefined operand, and the code is
// the same.
template <>
struct Vec<float> {
  using Register = __m512;
  static constexpr int kLanes = 16;
  static PGOLF_INLINE Register zero() { return _mm512_setzero_ps(); }
  static PGOLF_INLINE Register load(const float* p) { return _mm512_loadu_ps(p); }
  static PGOLF_INLINE void store(float* p, Register x) { _mm512_storeu_ps(p, x); }
  static PGOLF_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  static PGOLF_INLINE Register load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static PGOLF_INLINE void store_first(float* p, Register x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }
  static PGOLF_INLINE Register repeat(const float* p) { return _mm512_set1_ps(*p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }

  static PGOLF_INLINE Register four_rows(const float* const* rows, int row, int column) {
    const auto part = [&](int r) { return _mm_loadu_ps(rows[row + r] + column); };
    Register x = _mm512_castps128_ps512(part(0));
    x = _mm512_insertf32x4(x, part(4), 1);
    x = _mm512_insertf32x4(x, part(8), 2);
    return _mm512_insertf32x4(x, part(12), 3);
  }
  static PGOLF_INLINE void transpose(const float* const* rows, float* out, std::int64_t step) {
    for (int j = 0; j < kLanes; j += 4, out += 4 * step) {
      const Register r0 = four_rows(rows, 0, j), r1 = four_rows(rows, 1, j), r2 = four_rows(rows, 2, j),
                     r3 = four_rows(rows, 3, j);
      const auto wide = [](Register x) { return _mm512_castps_pd(x); };
      const auto low = [&](Register a, Register b) {
        return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xFF, wide(a), wide(b)));
      };
      const auto high = [&](Register a, Register b) {
        return _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xFF, wide(a), wide(b)));
      };
      const Register s0 = _mm512_maskz_unpacklo_ps(0xFFFF, r0, r1), s1 = _mm512_maskz_unpackhi_ps(0xFFFF, r0, r1),
                     s2 = _mm512_maskz_unpacklo_ps(0xFFFF, r2, r3), s3 = _mm512_maskz_unpackhi_ps(0xFFFF, r2, r3);
      store(out, low(s0, s2));
      store(out + step, high(s0, s2));
      store(out + 2 * step, low(s1, s3));
      store(out + 3 * step, high(s1, s3));
    }
  }
};

template <>
struct Vec<double> {
  using Register = __m512d;
  static constexpr int kLanes = 8;
  static PGOLF_INLINE Register zero() { return _mm512_setzero_pd(); }
  static PGOLF_INLINE Register load(const double* p) { return _mm512_loadu_pd(p); }
  static PGOLF_INLINE void store(double* p, Register x) { _mm512_storeu_pd(p, x); }
  static PGOLF_INLINE __mmask8 first(int count) { return static_cast<__mmask8>((1u << count) - 1); }
  static PGOLF_INLINE Register load_first(const double* p, int count) { return _mm512_maskz_loadu_pd(first(count), p); }
  static PGOLF_INLINE void store_first(double* p, Register x, int count) { _mm512_mask_storeu_pd(p, first(count), x); }
  static PGOLF_INLINE Register repeat(const double* p) { return _mm512_set1_pd(*p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_pd(a, b, c); }

  static PGOLF_INLINE Register four_rows(const double* const* rows, int row, int column) {
    const auto part = [&](int r) { return _mm_loadu_pd(rows[row + r] + column); };
    Register x = _mm512_castpd128_pd512(part(0));
    x = _mm512_insertf64x2(x, part(2), 1);
    x = _mm512_insertf64x2(x, part(4), 2);
    return _mm512_insertf64x2(x, part(6), 3);
  }
  static PGOLF_INLINE void transpose(const double* const* rows, double* out, std::int64_t step) {
    for (int j = 0; j < kLanes; j += 2, out += 2 * step) {
      const Register r0 = four_rows(rows, 0, j), r1 = four_rows(rows, 1, j);
      store(out, _mm512_maskz_unpacklo_pd(0xFF, r0, r1));
      store(out + step, _mm512_maskz_unpackhi_pd(0xFF, r0, r1));
    }
  }
};

#elif defined(__AVX2__)

// Eight words that are all ones and eight zeros: a mask of `count` lanes begins 8 − count words in.
alignas(64) inline constexpr std::int32_t kMaskWords[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

template <>
struct Vec<float> {
  using Register = __m256;
  static constexpr int kLanes = 8;
  static PGOLF_INLINE Register zero() { return _mm256_setzero_ps(); }
  static PGOLF_INLINE Register load(const float* p) { return _mm256_loadu_ps(p); }
  static PGOLF_INLINE void store(float* p, Register x) { _mm256_storeu_ps(p, x); }
  static PGOLF_INLINE __m256i first(int count) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskWords + 8 - count));
  }
  static PGOLF_INLINE Register load_first(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static PGOLF_INLINE void store_first(float* p, Register x, int count) { _mm256_maskstore_ps(p, first(count), x); }
  static PGOLF_INLINE Register repeat(const float* p) { return _mm256_broadcast_ss(p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }

  static PGOLF_INLINE Register two_rows(const float* const* rows, int row, int column) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[row] + column)),
                                _mm_loadu_ps(rows[row + 4] + column), 1);
  }
  static PGOLF_INLINE void transpose(const float* const* rows, float* out, std::int64_t step) {
    for (int j = 0; j < kLanes; j += 4, out += 4 * step) {
      const Register r0 = two_rows(rows, 0, j), r1 = two_rows(rows, 1, j), r2 = two_rows(rows, 2, j),
                     r3 = two_rows(rows, 3, j);
      const auto wide = [](Register x) { return _mm256_castps_pd(x); };
      const auto low = [&](Register a, Register b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(wide(a), wide(b))); };
      const auto high = [&](Register a, Register b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(wide(a), wide(b))); };
      const Register s0 = _mm256_unpacklo_ps(r0, r1), s1 = _mm256_unpackhi_ps(r0, r1), s2 = _mm256_unpacklo_ps(r2, r3),
                     s3 = _mm256_unpackhi_ps(r2, r3);
      store(out, low(s0, s2));
      store(out + step, high(s0, s2));
      store(out + 2 * step, low(s1, s3));
      store(out + 3 * step, high(s1, s3));
    }
  }
};

template <>
struct Vec<double> {
  using Register = __m256d;
  static constexpr int kLanes = 4;
  static PGOLF_INLINE Register zero() { return _mm256_setzero_pd(); }
  static PGOLF_INLINE Register load(const double* p) { return _mm256_loadu_pd(p); }
  static PGOLF_INLINE void store(double* p, Register x) { _mm256_storeu_pd(p, x); }
  static PGOLF_INLINE __m256i first(int count) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMaskWords + 8 - 2 * count));
  }
  static PGOLF_INLINE Register load_first(const double* p, int count) { return _mm256_maskload_pd(p, first(count)); }
  static PGOLF_INLINE void store_first(double* p, Register x, int count) { _mm256_maskstore_pd(p, first(count), x); }
  static PGOLF_INLINE Register repeat(const double* p) { return _mm256_broadcast_sd(p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_pd(a, b, c); }

  static PGOLF_INLINE Register two_rows(const double* const* rows, int row, int column) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(rows[row] + column)),
                                _mm_loadu_pd(rows[row + 2] + column), 1);
  }
  static PGOLF_INLINE void transpose(const double* const* rows, double* out, std::int64_t step) {
    for (int j = 0; j < kLanes; j += 2, out += 2 * step) {
      const Register r0 = two_rows(rows, 0, j), r1 = two_rows(rows, 1, j);
      store(out, _mm256_unpacklo_pd(r0, r1));
      store(out + step, _mm256_unpackhi_pd(r0, r1));
    }
  }
};

#else

// What 16-byte registers and machines without any have in common.
template <class T, class Own>
struct NarrowVec {
  static PGOLF_INLINE auto load_first(const T* p, int count) {
    T all[Own::kLanes] = {};
    for (int i = 0; i < count; ++i) all[i] = p[i];
    return Own::load(all);
  }
  template <class Register>
  static PGOLF_INLINE void store_first(T* p, Register x, int count) {
    T all[Own::kLanes];
    Own::store(all, x);
    for (int i = 0; i < count; ++i) p[i] = all[i];
  }
  static PGOLF_INLINE void transpose(const T* const* rows, T* out, std::int64_t step) {
    for (int j = 0; j < Own::kLanes; ++j)
      for (int i = 0; i < Own::kLanes; ++i) out[j * step + i] = rows[i][j];
  }
};

#if defined(PGOLF_SSE2)

template <>
struct Vec<float> : NarrowVec<float, Vec<float>> {
  using Register = __m128;
  static constexpr int kLanes = 4;
  static PGOLF_INLINE Register zero() { return _mm_setzero_ps(); }
  static PGOLF_INLINE Register load(const float* p) { return _mm_loadu_ps(p); }
  static PGOLF_INLINE void store(float* p, Register x) { _mm_storeu_ps(p, x); }
  static PGOLF_INLINE Register repeat(const float* p) { return _mm_set1_ps(*p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) {
    return _mm_add_ps(_mm_mul_ps(a, b), c);
  }
};

template <>
struct Vec<double> : NarrowVec<double, Vec<double>> {
  using Register = __m128d;
  static constexpr int kLanes = 2;
  static PGOLF_INLINE Register zero() { return _mm_setzero_pd(); }
  static PGOLF_INLINE Register load(const double* p) { return _mm_loadu_pd(p); }
  static PGOLF_INLINE void store(double* p, Register x) { _mm_storeu_pd(p, x); }
  static PGOLF_INLINE Register repeat(const double* p) { return _mm_set1_pd(*p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) {
    return _mm_add_pd(_mm_mul_pd(a, b), c);
  }
};

#elif defined(PGOLF_NEON)

template <>
struct Vec<float> : NarrowVec<float, Vec<float>> {
  using Register = float32x4_t;
  static constexpr int kLanes = 4;
  static PGOLF_INLINE Register zero() { return vdupq_n_f32(0); }
  static PGOLF_INLINE Register load(const float* p) { return vld1q_f32(p); }
  static PGOLF_INLINE void store(float* p, Register x) { vst1q_f32(p, x); }
  static PGOLF_INLINE Register repeat(const float* p) { return vld1q_dup_f32(p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) { return vfmaq_f32(c, a, b); }
};

template <>
struct Vec<double> : NarrowVec<double, Vec<double>> {
  using Register = float64x2_t;
  static constexpr int kLanes = 2;
  static PGOLF_INLINE Register zero() { return vdupq_n_f64(0); }
  static PGOLF_INLINE Register load(const double* p) { return vld1q_f64(p); }
  static PGOLF_INLINE void store(double* p, Register x) { vst1q_f64(p, x); }
  static PGOLF_INLINE Register repeat(const double* p) { return vld1q_dup_f64(p); }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) { return vfmaq_f64(c, a, b); }
};

#else

template <class T>
struct Vec : NarrowVec<T, Vec<T>> {
  static constexpr int kLanes = 4;
  struct Register {
    T lane[kLanes];
  };
  static PGOLF_INLINE Register zero() { return {}; }
  static PGOLF_INLINE Register load(const T* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static PGOLF_INLINE void store(T* p, Register x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
  }
  static PGOLF_INLINE Register repeat(const T* p) { return {{*p, *p, *p, *p}}; }
  static PGOLF_INLINE Register multiply_add(Register a, Register b, Register c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
};

#endif
#endif

// Fetches the line of p into L2. Anything may stand there, or nothing.
PGOLF_INLINE void prefetch(const void* p) {
#if defined(__AVX512F__) || defined(__AVX2__) || defined(PGOLF_SSE2)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#elif defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// The tile of results that a kernel keeps in registers: kTileRows × kTileVectors accumulators, and room for what is
// multiplied.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 14, kTileVectors = 2;  // of 32 registers
#elif defined(PGOLF_NEON)
inline constexpr int kTileRows = 12, kTileVectors = 2;  // of 32
#elif defined(PGOLF_SSE2) || defined(__AVX2__)
inline constexpr int kTileRows = 6, kTileVectors = 2;  // of 16
#else
inline constexpr int kTileRows = 4, kTileVectors = 1;
#endif

PGOLF_CPU_END
