// Floats that hold numbers of a 16-bit dtype: what a GPU stores there, rounded to nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/tensor.h"
#include "cpu/isa.h"

PGOLF_CPU_BEGIN

enum class Rounding { none, bf16, f16 };

PGOLF_INLINE float round_to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const float rounded = std::bit_cast<float>((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
  return x == x ? rounded : x;  // the carry of a NaN's payload must not make a number of it
}

PGOLF_INLINE float round_to_f16(float x) {
  const float magnitude = std::fabs(x);
  if (magnitude < 0x1p-14f) return std::nearbyint(x * 0x1p24f) * 0x1p-24f;  // fp16's subnormals are 2⁻²⁴ apart
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const float rounded = std::bit_cast<float>((bits + 0x0FFFu + ((bits >> 13) & 1u)) & 0xFFFFE000u);
  return magnitude < 65520.0f ? rounded : magnitude < INFINITY ? std::copysign(INFINITY, x) : x;
}

PGOLF_INLINE void round_values(Rounding rounding, float* x, std::int64_t count) {
  if (rounding == Rounding::bf16) {
    PGOLF_SIMD
    for (std::int64_t i = 0; i < count; ++i) x[i] = round_to_bf16(x[i]);
  } else if (rounding == Rounding::f16) {
    for (std::int64_t i = 0; i < count; ++i) x[i] = round_to_f16(x[i]);
  }
}
PGOLF_INLINE void round_values(Rounding, double*, std::int64_t) {}

PGOLF_CPU_END
