// How fast a backend multiplies matrices.
#pragma once

#include <span>

#include "backend.h"

namespace pgolf {

// FLOP/s of Backend::product, a [m, k] by b [n, k]: the median over `seconds`, after half as long of warm-up. a and b
// are `values`, numbers of S, one after the other and over and over: a GPU's rate depends on the bits that it moves.
double product_rate(Backend& backend, std::int64_t m, std::int64_t n, std::int64_t k,
                    std::span<const unsigned char> values, double seconds);

}  // namespace pgolf
