#include "core/random.h"

#include <cmath>
#include <numbers>

namespace pgolf {

PhiloxBlock philox4x32(PhiloxBlock c, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c;
}

std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xFFFFFFFFu;
  for (const char byte : bytes) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
  }
  return ~crc;
}

TensorRandom::TensorRandom(std::uint64_t seed, std::string_view tensor_name)
    : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}, stream_(crc32(tensor_name)) {}

std::array<double, 2> TensorRandom::pair(std::uint64_t element) const {
  const PhiloxBlock x =
      philox4x32({static_cast<std::uint32_t>(element), static_cast<std::uint32_t>(element >> 32), stream_, 0}, key_);
  const auto unit = [](std::uint32_t high, std::uint32_t low) {
    return static_cast<double>(((std::uint64_t{high} << 32) | low) >> 11) * 0x1p-53;
  };
  return {unit(x[0], x[1]), unit(x[2], x[3])};
}

double TensorRandom::normal(std::uint64_t element) const {
  const auto [u, v] = pair(element);
  return std::sqrt(-2.0 * std::log(1.0 - u)) * std::cos(2.0 * std::numbers::pi * v);
}

double TensorRandom::uniform(std::uint64_t element, double bound) const {
  return (2.0 * pair(element)[0] - 1.0) * bound;
}

}  // namespace pgolf
