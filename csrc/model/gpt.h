// The model: weights, gradients, and the passes over them, written once over backend.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "core/arena.h"
#include "model/config.h"
#include "model/passes.h"

namespace pgolf {

// PGOLF_ARENA=separate: every planned buffer has a block of its own, and blocks start as NaN.
bool separate_buffers();

// A block of a backend's memory.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() { reset(); }
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void reserve(Backend& backend, std::size_t bytes);  // keeps what it has if that is enough; content is lost
  void reset() noexcept;
  void swap(DeviceMemory& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::size_t bytes() const { return bytes_; }
  char* data() const { return static_cast<char*>(data_); }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// One tensor for each parameter, laid one after another (weights, gradients, a moment, an average).
class ParameterSet {
 public:
  void allocate(Backend& backend, const std::vector<ParameterSpec>& table, DType dtype);  // zeroed; once
  bool allocated() const { return memory_.bytes() > 0; }
  const TensorView& operator[](std::size_t index) const { return views_[index]; }
  std::size_t size() const { return views_.size(); }
  TensorView all() const { return all_; }  // everything as one vector, paddings included (they hold zeros)
  std::size_t bytes() const { return memory_.bytes(); }

 private:
  DeviceMemory memory_;
  std::vector<TensorView> views_;
  TensorView all_;
};

enum class Mode { logits, losses, train, adapt };  // adapt: as train, but only adapters have gradients

struct MemoryRow {
  std::string what;
  std::size_t bytes;
};

struct Plan;        // plan.h
struct RunOfShape;  // gpt.cpp: the plans of one shape

class GPT {
 public:
  // Without a seed the weights are zero, for a caller that replaces them all.
  GPT(const ModelConfig& config, std::unique_ptr<Backend> backend, std::optional<std::uint64_t> seed);
  ~GPT();

  const ModelConfig& config() const { return config_; }
  Backend& backend() const { return *backend_; }
  const std::vector<ParameterSpec>& table() const { return table_.specs; }
  std::size_t index_of(const std::string& name) const;      // throws std::invalid_argument
  const ParameterSet& weights() const { return weights_; }  // whoever writes to them calls weights_changed
  const ParameterSet& grads() const { return grads_; }
  void weights_changed() {
    copies_ = Copies::stale;
    ++changes_;
  }
  StepValues* values();  // of training, in the backend's memory

  // ids, targets: [B, T] in host memory, every id in 0 … V−1 (checked). Outputs in host memory, float or double as
  // the backend's master dtype.
  void logits(const std::int32_t* ids, std::int64_t B, std::int64_t T, std::int64_t first, void* out);
  void losses(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T, std::int64_t first,
              void* out);

  // The same without waiting: returns a ticket for backend().wait, of at most Backend::kReadBytes.
  int losses_later(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                   std::int64_t first);

  // Late QAT's largest integer for every parameter of the table, 0: never fake-quantised, as all are at first. Before
  // the first step with it.
  void set_qat_clips(const std::vector<int>& clips);

  // A training step: begin_step, micro_step for each part of the batch, end_step; then the gradients stand in
  // grads(), times values()->loss_scale, and the sum of the losses in values()->loss_sum. loss_scale is 1/(tokens of
  // the step) for a mean. Nothing is allocated from the second step of a shape on, and no call waits for the backend.
  void begin_step(bool qat);
  void micro_step(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                  double loss_scale);
  void end_step();
  double loss_sum();  // waits for the step

  // Whether the layers run with their loops, from the next run on; a model that has any starts with them. Nothing is
  // allocated but the plan of a shape that has not run this way before, in the arena that it has.
  void set_looping(bool looping);
  bool looping() const { return looping_; }

  // Plans the arena for a shape without running it.
  void prepare(Mode mode, std::int64_t B, std::int64_t T);
  // Bytes of the arena that a training shape would need, with loops and without.
  std::size_t training_bytes(std::int64_t B, std::int64_t T) const;
  std::vector<MemoryRow> memory_table() const;

  // For whoever plans runs of its own over these weights (decode.h, adapters.h): a Plan of these passes is bound, laid
  // out and run, with working copies of the weights as they are now.
  const std::vector<Pass>& passes() const { return passes_[looping_]; }
  void bind(Plan& plan, bool qat) const;  // points the operations at the parameters: the weights or their copies
  void ensure_copies(bool qat);
  std::int64_t changes() const { return changes_; }  // of weights and loops so far
  // Throws std::invalid_argument for an id outside 0 … V − 1 in [B, T].
  void check_ids(const char* what, const std::int32_t* ids, std::int64_t B, std::int64_t T) const;

 private:
  Plan& plan_for(Mode mode, std::int64_t B, std::int64_t T, std::int64_t first);
  Plan& run_losses(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                   std::int64_t first);
  // What products read in a parameter's place.
  enum class Reads { itself, working, quantized };
  Reads reads(std::size_t index, bool qat) const;
  double copy_factor(std::size_t index) const;
  void make_copies(bool qat);
  void check_heads() const;  // throws std::invalid_argument where the backend's attention does not have their width
  void write(const TensorView& to, const std::vector<float>& values);
  std::unique_ptr<Plan> planned(Mode mode, std::int64_t B, std::int64_t T, std::int64_t first, bool looping) const;

  ModelConfig config_;
  std::unique_ptr<Backend> backend_;  // outlives the memory below
  ParameterTable table_;
  std::vector<int> qat_clips_;   // of every parameter
  std::vector<Pass> passes_[2];  // without and with loops
  bool looping_ = false;
  ParameterSet weights_, grads_;
  // What products read in place of weights: rounded, scaled (projections) or fake-quantised (late QAT). Where nothing
  // is rounded, matrices that only QAT changes have their copies in quantized_, made when it is first asked for.
  ParameterSet working_, quantized_;
  enum class Copies { stale, plain, qat } copies_ = Copies::stale;
  std::int64_t changes_ = 0;
  std::vector<WorkingCopy> copy_list_[2];  // without and with QAT
  std::vector<ProjectionEnd> end_list_[2];
  DeviceMemory values_;
  int begin_recording_[2] = {};
  // The two last shapes of each kind: a step's last micro-batch may be smaller than the others.
  std::vector<std::unique_ptr<RunOfShape>> inference_, training_;  // most recently used first
  bool qat_ = false;                                               // of the step that was begun
};

}  // namespace pgolf
