// Rotation tables (docs/spec.md §2.5).
#pragma once

#include <cstdint>
#include <vector>

namespace pgolf {

struct RopeTables {
  std::vector<double> cos, sin;  // [length, head_dim / 2]
};

// bf16: frequencies, positions, angles and tables each rounded to bfloat16, as the public script has them.
RopeTables rope_tables(std::int64_t length, std::int64_t head_dim, double base, bool bf16);

}  // namespace pgolf
