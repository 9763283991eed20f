// One product of the CPU's kernels by itself: for tests of the order of sums and for benchmarks. Operations call
// gemm.h.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace pgolf {

struct CpuProduct {
  enum Kind { kChain, kPacked, kBlocks, kSymmetric } kind = kChain;  // gemm.h's gemm, gemm_packed, gemm_blocks, …
  DType dtype = DType::f32;                                          // or f64
  bool transpose_a = false, transpose_b = false;                     // kPacked and kSymmetric take A as it is
  bool from_c = false;                                               // kChain, kPacked
  double alpha = 1;                                                  // kBlocks
  std::int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  std::int64_t lda = 0;
  const void* b = nullptr;  // not read by kSymmetric, whose C has rows of n numbers
  std::int64_t ldb = 0;
  void* c = nullptr;
  std::int64_t ldc = 0;
  void* packed = nullptr;  // kPacked: room for packed_numbers(n, k)
};

// At least what a packed right-hand side takes on any instruction set.
inline std::int64_t packed_numbers(std::int64_t n, std::int64_t k) { return (n + 63) / 64 * 64 * k; }

void cpu_product(const CpuProduct& product);  // on this thread, by the kernels that make_cpu_backend uses

}  // namespace pgolf
