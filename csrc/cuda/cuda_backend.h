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

#include "backend.h"
#include "core/error.h"
#include "cuda/kernel_set.h"

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

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, DType storage);
  ~CudaBackend() override;

  DType dtype() const override { return storage_; }
  DType master_dtype() const override { return DType::f32; }
  DType precision() const override { return storage_; }
  std::string description() const override;
  int concurrency() const override { return 1; }

  void* allocate(std::size_t bytes) override;
  void release(void* pointer) noexcept override;
  std::size_t memory_limit() const override;
  std::size_t peak_memory() const override { return peak_; }
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;
  void zero(const TensorView& t) override;
  void copy(const TensorView& to, const TensorView& from) override;
  void synchronize() override;
  int read_later(const void* from, std::size_t bytes) override;
  void wait(int ticket, void* to, std::size_t bytes) override;
  int capture(int recording, const std::function<void()>& fn) override;
  void forget(int recording) noexcept override;

  OpBytes bytes(const Embed&) const override;
  void embed_forward(const Embed&) override;
  void embed_backward(const Embed&, const EmbedGrads&) override;
  OpBytes bytes(const Qkv&) const override;
  void qkv_forward(const Qkv&) override;
  void qkv_backward(const Qkv&, const QkvGrads&) override;
  void heads_backward(const Qkv&, const TensorView& dqkv) override;
  OpBytes bytes(const Attention&) const override;
  void attention_forward(const Attention&) override;
  void attention_backward(const Attention&, const AttentionGrads&) override;
  OpBytes bytes(const ProjectResidual&) const override;
  void project_residual_forward(const ProjectResidual&) override;
  void project_residual_backward(const ProjectResidual&, const ProjectResidualGrads&) override;
  OpBytes bytes(const MlpUp&) const override;
  void mlp_up_forward(const MlpUp&) override;
  void mlp_up_backward(const MlpUp&, const MlpUpGrads&) override;
  OpBytes bytes(const Head&) const override;
  void head_logits(const Head&) override;
  void head_loss(const Head&) override;
  void head_loss_backward(const Head&, const HeadGrads&) override;

  void product(const TensorView& a, const TensorView& b, const TensorView& out) override;
  void working_copies(std::span<const WorkingCopy> copies) override;
  void finish_projections(std::span<const ProjectionEnd> projections) override;
  void add_sum(const TensorView& t, double* sum) override;
  void grad_norm(std::span<const TensorView> grads, StepValues* values) override;
  void adam(std::span<const AdamTensor> tensors, const StepValues* values) override;
  std::size_t muon_scratch(std::span<const MuonTensor> tensors) const override;
  void muon(std::span<const MuonTensor> tensors, int ns_steps, const StepValues* values, void* scratch) override;
  std::size_t newton_schulz_scratch(const TensorView& u) const override;
  void newton_schulz(const TensorView& u, const TensorView& out, int steps, void* scratch) override;
  void quantize_rows(const TensorView& w, int clip, const TensorView& q, const TensorView& scale) override;
  void dequantize_rows(const TensorView& q, const TensorView& scale, const TensorView& w) override;
  void adapters_begin(std::span<const AdapterRows> adapters, const TensorView& documents, std::uint64_t seed) override;
  void adapters_step(std::span<const AdapterRows> adapters, const TensorView& steps,
                     const AdapterAdam& settings) override;
  void axpby(double a, const TensorView& x, double b, const TensorView& y, const StepValues* gate) override;

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
