// The CPU backend: the plain reading of backend.h, fused only as far as a cache asks for.
#pragma once

#include "backend.h"
#include "core/parallel.h"
#include "cpu/isa.h"
#include "cpu/rounding.h"

PGOLF_CPU_BEGIN

template <class T>
class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(Rounding rounding) : rounding_(rounding) {}
  ~CpuBackend() override;

  DType dtype() const override { return sizeof(T) == 8 ? DType::f64 : DType::f32; }
  DType master_dtype() const override { return dtype(); }
  DType precision() const override {
    return rounding_ == Rounding::bf16 ? DType::bf16 : rounding_ == Rounding::f16 ? DType::f16 : dtype();
  }
  std::string description() const override;
  int concurrency() const override { return thread_count(); }

  void* allocate(std::size_t bytes) override;
  void release(void* pointer) noexcept override;
  std::size_t memory_limit() const override { return 0; }
  std::size_t peak_memory() const override { return 0; }
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;
  void zero(const TensorView& t) override;
  void copy(const TensorView& to, const TensorView& from) override;
  void synchronize() override {}
  int read_later(const void* from, std::size_t bytes) override;
  void wait(int ticket, void* to, std::size_t bytes) override;
  int capture(int recording, const std::function<void()>& fn) override;
  void forget(int) noexcept override {}

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

 private:
  void round(T* x, std::int64_t count) const { round_values(rounding_, x, count); }
  void copy_adapters(const AdapterRows& adapters, std::int64_t row) const;

  Rounding rounding_;
  int next_read_ = 0;
  // A step's values fit in place; more is allocated when it is first read.
  struct Read {
    unsigned char small[512];
    unsigned char* large = nullptr;
    std::size_t room = 0;
  } reads_[kReads];
};

PGOLF_CPU_END
