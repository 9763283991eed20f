// Counter-based random numbers (docs/spec.md §1): a value depends on (seed, tensor name, element) alone,
// so adding or dropping a tensor changes no other.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace pgolf {

using PhiloxBlock = std::array<std::uint32_t, 4>;

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
PhiloxBlock philox4x32(PhiloxBlock counter, std::array<std::uint32_t, 2> key);

std::uint32_t crc32(std::string_view bytes);  // the IEEE polynomial, as zlib's

class TensorRandom {
 public:
  TensorRandom(std::uint64_t seed, std::string_view tensor_name);

  double normal(std::uint64_t element) const;                 // Box–Muller, the cosine half
  double uniform(std::uint64_t element, double bound) const;  // in [−bound, bound)

 private:
  std::array<double, 2> pair(std::uint64_t element) const;  // u, v in [0, 1), 53 bits each

  std::array<std::uint32_t, 2> key_;
  std::uint32_t stream_;
};

}  // namespace pgolf
