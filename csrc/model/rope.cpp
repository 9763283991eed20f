#include "model/rope.h"

#include <bit>
#include <cmath>

namespace pgolf {
namespace {

float round_bf16(float x) {  // to nearest, ties to even; finite input
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

}  // namespace

RopeTables rope_tables(std::int64_t length, std::int64_t head_dim, std::int64_t dims, double base, bool bf16) {
  const std::int64_t half = head_dim / 2;
  RopeTables tables;
  tables.cos.resize(static_cast<std::size_t>(length * half), 1.0);
  tables.sin.resize(tables.cos.size(), 0.0);
  for (std::int64_t j = 0; j < dims / 2; ++j) {
    const double exponent = 2.0 * static_cast<double>(j) / static_cast<double>(dims);
    const double frequency = std::pow(base, -exponent);
    // The script's float32 expression, before its cast.
    const float cast = round_bf16(1.0f / std::pow(static_cast<float>(base), static_cast<float>(exponent)));
    for (std::int64_t t = 0; t < length; ++t) {
      const std::size_t at = static_cast<std::size_t>(t * half + j);
      if (bf16) {
        const float angle = round_bf16(round_bf16(static_cast<float>(t)) * cast);
        tables.cos[at] = round_bf16(std::cos(angle));
        tables.sin[at] = round_bf16(std::sin(angle));
      } else {
        tables.cos[at] = std::cos(static_cast<double>(t) * frequency);
        tables.sin[at] = std::sin(static_cast<double>(t) * frequency);
      }
    }
  }
  return tables;
}

}  // namespace pgolf
