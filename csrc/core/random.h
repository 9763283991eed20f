// Counter-based random numbers (docs/spec.md §1): a value depends on (seed, tensor name, element) alone, and for
// adapters on the document, so adding or dropping a tensor changes no other. Kernels of every backend inline this file.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "core/tensor.h"

namespace pgolf {

using PhiloxBlock = std::array<std::uint32_t, 4>;

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
PGOLF_INLINE constexpr PhiloxBlock philox4x32(PhiloxBlock c, std::array<std::uint32_t, 2> key) {
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

std::uint32_t crc32(std::string_view bytes);  // the IEEE polynomial, as zlib's

class TensorRandom {
 public:
  TensorRandom(std::uint64_t seed, std::string_view tensor_name) : TensorRandom(seed, crc32(tensor_name), 0) {}
  // stream: the CRC-32 of the tensor's name
  PGOLF_INLINE constexpr TensorRandom(std::uint64_t seed, std::uint32_t stream, std::uint32_t document)
      : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)},
        stream_(stream),
        document_(document) {}

  double normal(std::uint64_t element) const;  // Box–Muller, the cosine half
  // In [−bound, bound). Contracted or not, 2u − 1 is exact: every compiler gets the same number.
  PGOLF_INLINE constexpr double uniform(std::uint64_t element, double bound) const {
    return (2.0 * pair(element)[0] - 1.0) * bound;
  }

 private:
  // u, v in [0, 1), 53 bits each
  PGOLF_INLINE constexpr std::array<double, 2> pair(std::uint64_t element) const {
    const PhiloxBlock x = philox4x32(
        {static_cast<std::uint32_t>(element), static_cast<std::uint32_t>(element >> 32), stream_, document_}, key_);
    return {unit(x[0], x[1]), unit(x[2], x[3])};
  }
  PGOLF_INLINE static constexpr double unit(std::uint32_t high, std::uint32_t low) {
    return static_cast<double>(((std::uint64_t{high} << 32) | low) >> 11) * 0x1p-53;
  }

  std::array<std::uint32_t, 2> key_;
  std::uint32_t stream_, document_;
};

}  // namespace pgolf
