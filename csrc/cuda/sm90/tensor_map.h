// Tensor maps: how TMA finds boxes of a matrix in memory.
#pragma once

#include <cuda.h>

#include "cuda/cuda_backend.h"

namespace pgolf::cuda::sm90 {

inline constexpr int kBoxColumns = 64;  // 128 bytes: the widest row that can be swizzled

// Boxes [box_rows, 64] of row-major matrices [count, rows, columns] of 16-bit numbers, swizzled by 128 bytes. data is
// aligned to 16 bytes and columns a multiple of 8.
CUtensorMap tensor_map(const void* data, DType dtype, i64 count, i64 rows, i64 columns, int box_rows);

}  // namespace pgolf::cuda::sm90
