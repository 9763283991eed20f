// One product of the CPU's kernels by itself: for tests of the order of sums and for benchmarks. Operations call
// gemm.h.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace pgolf {

struct CpuProduct {
  // gemm.h's gemm, gemm_packed, gemm_blocks, gemm_packed_block for every block, gemm_symmetric
  enum Kind { kChain, kPacked, kBlocks, kPackedBlocks, kSymmetric } kind = kChain;
  DType dtype = DType::f32;  // or f64
  bool transpose_a = false;  // kPacked and kSymmetric take A as it is, kPackedBlocks transposed
  bool transpose_b = false;
  bool from_c = false;  // kChain, kPacked
  double alpha = 1;     // kBlocks, kPackedBlocks
  std::int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  std::int64_t lda = 0;
  const void* b = nullptr;  // not read by kSymmetric, whose C has rows of n numbers
  std::int64_t ldb = 0;
  void* c = nullptr;
  std::int64_t ldc = 0;
  void* packed = nullptr;  // kPacked, kPackedBlocks: room for packed_numbers(n, k)
};

// At least what a packed right-hand side takes on any instruction set.
inline std::int64_t packed_numbers(std::int64_t n, std::int64_t k) { return (n + 63) / 64 * 64 * k; }

// The processor's limit for products: `steps` times as many independent float32 multiply-adds as a kernel has
// accumulators, on registers alone. Returns the number of floating-point operations.
double cpu_multiply_adds(std::int64_t steps);

void cpu_product(const CpuProduct& product);  // on this thread, by the kernels that make_cpu_backend uses

}  // namespace pgolf
