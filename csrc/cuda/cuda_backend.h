// The CUDA backend: one GPU, one stream. The files of this folder have the names of cpu/ and compute the same;
// what is one file there, optim.cpp, is grad_norm.cu, adam.cu, muon.cu, adapter_optim.cu and axpby.cu here.
//
// Rules of this folder
//   Everything runs on `stream()`, in order; nothing but download, wait and synchronize waits for it; nothing allocates
//   outside `allocate`. Every kernel launch is followed by PGOLF_LAUNCHED. The order of sums depends on tensor
//   shapes alone, not on which block or how many make them; there are no floating-point atomics. Element kernels are
//   templates over the storage type S (float, __nv_bfloat16, __half) and compute in float.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/kernel_set.h"
#include "sublayers.h"

namespace pgolf::cuda {

using i64 = std::int64_t;

// D[m, n] = alpha·op(A)[m, k]·op(B)[k, n] + beta·C, row-major, `count` of them `*_step` elements apart. C may be D.
// A and B have one dtype (f32: no TF32; bf16, f16), C and D another of f32 and that of A. Sums are float32.
struct Gemm {
  bool transpose_a = false, transpose_b = false;  // op(A) = Aᵀ: A is stored [k, m]
  i64 m = 0, n = 0, k = 0;
  const void* a = nullptr;
  i64 lda = 0;  // elements from a row to the next
  const void* b = nullptr;
  i64 ldb = 0;
  DType in = DType::f32;
  const void* c = nullptr;  // null: D
  void* d = nullptr;
  i64 ldd = 0;  // of C too
  DType out = DType::f32;
  float alpha = 1.0f, beta = 0.0f;
  i64 count = 1, a_step = 0, b_step = 0, d_step = 0;
};

class Blas;      // blas.h: cuBLASLt, opened at run time
class Transfer;  // transfer.h: pinned rings for uploads and later reads

class CudaBackend final : public ComposedBackend {
 public:
  CudaBackend(int device, DType storage);
  ~CudaBackend() override;

#define PGOLF_METHOD(result, name, parameters, arguments) result name parameters override;
#include "backend_methods.def"
#include "piece_methods.def"
#undef PGOLF_METHOD
  int capture(int recording, const std::function<void()>& fn) override;

  // For the files of this folder.
  cudaStream_t stream() const {  // makes this device the calling thread's: a launch needs that
    use();
    return stream_;
  }
  bool has_wgmma() const { return cuda::has_wgmma(kernel_set_); }
  int sm_count() const { return properties_.multiProcessorCount; }
  void gemm(const Gemm& product) const;  // blas.cpp

  static constexpr int kPartials = 1024;  // room for the partial sums of add_sum and grad_norm

 private:
  struct Closed {};  // nothing opened yet: from here on the destructor cleans up after a constructor that throws
  CudaBackend(int device, DType storage, Closed);
  void use() const;

  int device_;
  DType storage_;
  cudaDeviceProp properties_{};
  KernelSet kernel_set_ = KernelSet::sm80;
  cudaStream_t stream_ = nullptr;
  std::size_t allocated_ = 0, peak_ = 0, limit_ = 0;  // bytes
  bool graphs_ = true;
  double* partials_ = nullptr;  // [kPartials]
  std::unique_ptr<Blas> blas_;
  std::unique_ptr<Transfer> transfer_;
  std::vector<cudaGraphExec_t> recordings_;  // recording r is [r − 1]; null: forgotten
  std::vector<std::pair<void*, std::size_t>> blocks_;
};

}  // namespace pgolf::cuda
