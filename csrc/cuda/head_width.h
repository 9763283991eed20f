// The widths of a head that attention is compiled for: the same for every dtype and on every GPU.
#pragma once

#include <cstdint>

#include "core/error.h"

namespace pgolf::cuda {

inline constexpr int kLeastHeadWidth = 32, kMostHeadWidth = 128, kHeadWidthStep = 8;

inline void require_head_width(std::int64_t width) {
  require(width >= kLeastHeadWidth && width <= kMostHeadWidth && width % kHeadWidthStep == 0, "Attention heads are ",
          width, " wide; on a GPU the width of a head must be a multiple of ", kHeadWidthStep, " from ",
          kLeastHeadWidth, " to ", kMostHeadWidth, ".");
}

}  // namespace pgolf::cuda
