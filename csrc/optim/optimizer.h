// The optimizer: Muon for matrices, AdamW for the rest, one global clip; and weight averaging.  docs/spec.md §3
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/gpt.h"

namespace pgolf {

struct StepResult {
  double loss_sum;  // of the step's micro-batches
  double grad_norm;
  bool finite;             // else the step changed nothing
  std::int64_t saturated;  // hidden values that fp16 could not hold
  std::int64_t overflows;  // in a row, this step's the last, at the least loss scale
};

// What the optimizer keeps from step to step besides its moments.
struct StepCounts {
  std::int64_t adam_steps;  // t
  double loss_scale;        // fp16
  std::int64_t clean;       // StepValues::clean
};

class Optimizer {
 public:
  Optimizer(std::shared_ptr<GPT> model, const MuonRule& rule);
  ~Optimizer();
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // Applies the gradients that stand in the model; where they are not finite, nothing changes. Does not wait for the
  // backend: returns a ticket for `wait`. At most Backend::kReads steps are under way.
  int step(const StepSettings& settings);
  StepResult wait(int ticket);
  // After a step that was not finite no step changes anything, until this says that the host knows.
  void go_on();

  StepCounts counts() const;  // waits for the backend
  void set_counts(const StepCounts& counts);

  // Records everything a training step runs, for micro-batches of these sizes, by running it once without effect, and
  // with `averaging` makes room for the average: no later step compiles, allocates or chooses anything. qat, looping:
  // steps are to come with it as well as without. Call before the first step.
  void warm_up(const std::vector<std::int64_t>& batches, std::int64_t T, double loss_scale, bool qat, bool looping,
               bool averaging);

  // Averaging. A snapshot adds the weights to a running sum; the mean replaces the weights at the end.
  void add_snapshot();
  std::int64_t snapshots() const { return snapshots_; }
  void set_snapshots(std::int64_t count);
  void use_snapshot_mean();       // throws without a snapshot
  void start_ema();               // average ← weights
  void update_ema(double decay);  // average ← decay·average + (1 − decay)·weights
  void use_ema();

  // All state but the weights, by name, for checkpoints: "momentum.<parameter>", "adam_m.…", "adam_v.…", "average.…".
  struct State {
    std::string name;
    TensorView tensor;
  };
  std::vector<State> state() const;

  std::size_t bytes() const;

 private:
  StepValues read_values() const;

  std::shared_ptr<GPT> model_;
  MuonRule rule_;
  std::int64_t snapshots_ = 0;
  ParameterSet first_, second_, average_;  // momentum or m; v; running sum or exponential average
  std::vector<TensorView> grads_;
  std::vector<AdamTensor> adam_;
  std::vector<MuonTensor> muon_;
  DeviceMemory scratch_;
  int concurrency_ = 0, recording_ = 0;
};

}  // namespace pgolf
