// Elementary functions that the compiler can vectorise: branch-free for float, libm for double.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/tensor.h"
#include "cpu/isa.h"

PGOLF_CPU_BEGIN

// eˣ for x ≤ 88, within 2 ulp: 2ⁿ·p(r), r = x − n·ln 2 with ln 2 in two parts, p of degree 6 (Taylor, |r| ≤ 0.35).
PGOLF_INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5·2²³ rounds to an integer, half to even
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const std::int32_t exponent = (std::bit_cast<std::int32_t>(shifted) - 0x4B400000 + 127) << 23;
  return p * std::bit_cast<float>(exponent);
}
PGOLF_INLINE double fast_exp(double x) { return std::exp(x); }

// tanh within 3 ulp: an odd polynomial below 0.625 (Cephes' coefficients), 1 − 2/(e²ˣ + 1) above.
PGOLF_INLINE float fast_tanh(float x) {
  const float a = x < 0 ? -x : x;
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = x + x * z * p;
  const float large = 1.0f - 2.0f / (fast_exp(2.0f * (a < 10.0f ? a : 10.0f)) + 1.0f);
  return a < 0.625f ? small : (x < 0 ? -large : large);
}
PGOLF_INLINE double fast_tanh(double x) { return std::tanh(x); }

PGOLF_CPU_END
