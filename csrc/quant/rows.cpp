#include "quant/rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "core/half.h"
#include "core/parallel.h"

namespace pgolf::quant {
namespace {

constexpr std::uint32_t kFloatInfinity = 0x7f800000;
constexpr std::uint16_t kHalfInfinity = 0x7c00;
constexpr std::uint16_t kHalfSmallestNormal = 0x0400;  // 2⁻¹⁴
constexpr double kClipQuantile = 0.9999984;
constexpr int kInt8Clip = 127;

// |value| as an integer: finite magnitudes order like their bit patterns, and only infinity and NaN reach
// kFloatInfinity.
std::uint32_t magnitude_bits(float value) { return std::bit_cast<std::uint32_t>(value) & 0x7fffffffu; }

std::uint32_t largest_magnitude(const float* w, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude_bits(w[i]));
  return largest;
}

// σ > 0 as fp16: at least the smallest normal number, infinity from 65520 on.
std::uint16_t half_scale(float sigma) { return std::max(half_bits(sigma), kHalfSmallestNormal); }

float round_clamp(float value, float low, float high) { return std::clamp(std::nearbyint(value), low, high); }

void divide_row(const float* row, std::int64_t columns, float sigma, float low, float high, std::int8_t* q) {
  for (std::int64_t i = 0; i < columns; ++i) q[i] = static_cast<std::int8_t>(round_clamp(row[i] / sigma, low, high));
}

// Quantises every row by quantize_row(row, q_row, scale), which is called for finite rows only.
template <class QuantizeRow>
void for_each_row(const float* w, std::int64_t rows, std::int64_t columns, std::int8_t* q, std::uint16_t* scale,
                  QuantizeRow quantize_row) {
  parallel_for(rows, [&](std::int64_t r) {
    const float* row = w + r * columns;
    // An infinite scale marks a row that cannot be written; the first one is named below.
    scale[r] = kHalfInfinity;
    if (largest_magnitude(row, columns) < kFloatInfinity) quantize_row(row, q + r * columns, scale[r]);
  });
  const auto bad = std::find(scale, scale + rows, kHalfInfinity) - scale;
  if (bad == rows) return;
  const auto largest = std::bit_cast<float>(largest_magnitude(w + bad * columns, columns));
  require(std::isfinite(largest), "Row ", bad, " holds NaN or infinity; only finite weights can be quantised.");
  require(false, "Row ", bad, " reaches the magnitude ", largest,
          ", whose scale is beyond 65504, the largest that fp16 holds.");
}

}  // namespace

void quantize_rows_amax(const float* w, std::int64_t rows, std::int64_t columns, int clip, std::int8_t* q,
                        std::uint16_t* scale) {
  const auto high = static_cast<float>(clip);
  for_each_row(w, rows, columns, q, scale, [=](const float* row, std::int8_t* q_row, std::uint16_t& row_scale) {
    const auto largest = std::bit_cast<float>(largest_magnitude(row, columns));
    row_scale = half_scale(std::max(largest / high, 1e-12f));
    const float sigma = float_from_half(row_scale);
    divide_row(row, columns, sigma, -high - 1.0f, high, q_row);
  });
}

void quantize_rows_quantile_floor(const float* w, std::int64_t rows, std::int64_t columns, std::int8_t* q,
                                  std::uint16_t* scale) {
  constexpr float high = kInt8Clip;
  for_each_row(w, rows, columns, q, scale, [=](const float* row, std::int8_t* q_row, std::uint16_t& row_scale) {
    const float limit = magnitude_quantile(row, columns, kClipQuantile);
    const float sigma = std::max(limit / high, 1.0f / high);
    row_scale = half_scale(sigma);
    for (std::int64_t i = 0; i < columns; ++i) {
      q_row[i] = static_cast<std::int8_t>(round_clamp(std::clamp(row[i], -limit, limit) / sigma, -high, high));
    }
  });
}

void quantize_rows_rms(const float* w, std::int64_t rows, std::int64_t columns, double steps, std::int8_t* q,
                       std::uint16_t* scale) {
  constexpr float high = kInt8Clip;
  double squares = 0;  // in order, by one thread
  for (std::int64_t i = 0; i < rows * columns; ++i) squares += double{w[i]} * w[i];
  const double mean = squares / std::max(static_cast<double>(rows * columns), 1.0);
  // What is not finite is named by its row below.
  const auto step = std::isfinite(mean) ? static_cast<float>(std::sqrt(mean) / steps) : 0.0f;
  for_each_row(w, rows, columns, q, scale, [=](const float* row, std::int8_t* q_row, std::uint16_t& row_scale) {
    const auto largest = std::bit_cast<float>(largest_magnitude(row, columns));
    row_scale = half_scale(std::max(step, largest / high));
    divide_row(row, columns, float_from_half(row_scale), -high, high, q_row);
  });
}

void dequantize_rows(const std::int8_t* q, const std::uint16_t* scale, std::int64_t rows, std::int64_t columns,
                     float* w) {
  for (std::int64_t r = 0; r < rows; ++r) {
    require((scale[r] & kHalfInfinity) != kHalfInfinity, "The scale of row ", r,
            " is NaN or infinite; it must be finite.");
  }
  parallel_for(rows, [=](std::int64_t r) {
    const float sigma = float_from_half(scale[r]);
    for (std::int64_t i = r * columns; i < (r + 1) * columns; ++i) w[i] = static_cast<float>(q[i]) * sigma;
  });
}

float magnitude_quantile(const float* w, std::int64_t count, double p) {
  std::vector<std::uint32_t> magnitudes(static_cast<std::size_t>(count));
  std::transform(w, w + count, magnitudes.begin(), magnitude_bits);
  const double position = p * static_cast<double>(count - 1);
  const auto below = static_cast<std::ptrdiff_t>(position);
  const double fraction = position - static_cast<double>(below);
  const auto neighbour = magnitudes.begin() + below;
  std::nth_element(magnitudes.begin(), neighbour, magnitudes.end());
  const double a = std::bit_cast<float>(*neighbour);
  if (fraction == 0.0) return static_cast<float>(a);
  const double b = std::bit_cast<float>(*std::min_element(neighbour + 1, magnitudes.end()));
  return static_cast<float>(a + (b - a) * fraction);
}

void prune(float* w, std::int64_t count, double p) {
  const std::uint32_t threshold = magnitude_bits(magnitude_quantile(w, count, p));
  std::replace_if(w, w + count, [=](float value) { return magnitude_bits(value) < threshold; }, 0.0f);
}

}  // namespace pgolf::quant
