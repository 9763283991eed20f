// Row quantisers, their inverse and magnitude pruning: the arithmetic of docs/spec.md §4. Everything is
// float32 with true division and round half to even; the bits of the results depend neither on the thread
// count nor on whether subnormal floats are flushed, since magnitudes are compared as integers.
//
// Matrices are contiguous and row-major: w and q are rows × columns; scale holds one fp16 bit pattern a
// row. NaN or infinity, and a scale beyond fp16's range, throw std::invalid_argument naming the first row.
#pragma once

#include <cstdint>

namespace pgolf::quant {

// σ = fp16(max(max|row| / clip, 1e-12)), at least 2⁻¹⁴; q = clamp(round(w / σ), −clip − 1, clip); 1 ≤ clip ≤ 127.
void quantize_rows_amax(const float* w, std::int64_t rows, std::int64_t columns, int clip, std::int8_t* q,
                        std::uint16_t* scale);

// The recipes' int8: t = the 99.99984 % quantile of |row|, σ = max(t / 127, 1 / 127) in float32,
// q = clamp(round(clamp(w, ±t) / σ), ±127); scale = fp16(σ). columns ≥ 1.
void quantize_rows_quantile_floor(const float* w, std::int64_t rows, std::int64_t columns, std::int8_t* q,
                                  std::uint16_t* scale);

// s = the root mean square of all of w, in float64; σ = fp16(max(s / steps, max|row| / 127)), at least 2⁻¹⁴;
// q = clamp(round(w / σ), ±127). Rows whose magnitudes have room in 127 steps share one step. steps > 0.
void quantize_rows_rms(const float* w, std::int64_t rows, std::int64_t columns, double steps, std::int8_t* q,
                       std::uint16_t* scale);

// w = q · scale in float32.
void dequantize_rows(const std::int8_t* q, const std::uint16_t* scale, std::int64_t rows, std::int64_t columns,
                     float* w);

// The p-quantile of |w|, 0 ≤ p ≤ 1, count ≥ 1: position p·(count − 1) and linear interpolation between
// its neighbours a and b, a + (b − a)·fraction, both in float64, rounded once to float32.
float magnitude_quantile(const float* w, std::int64_t count, double p);

// Zeroes the entries with |w| strictly below the p-quantile of |w|.
void prune(float* w, std::int64_t count, double p);

}  // namespace pgolf::quant
