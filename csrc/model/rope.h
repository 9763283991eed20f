// Rotation tables (docs/spec.md §2.5).
#pragma once

#include <cstdint>
#include <vector>

namespace pgolf {

struct RopeTables {
  std::vector<double> cos, sin;  // [length, head_dim / 2]; columns from dims / 2 on are 1 and 0
};

// For heads whose first `dims` numbers are turned. bf16: frequencies, positions, angles and tables each rounded to
// bfloat16, as the public script has them.
RopeTables rope_tables(std::int64_t length, std::int64_t head_dim, std::int64_t dims, double base, bool bf16);

}  // namespace pgolf
