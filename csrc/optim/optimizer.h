// The optimizer: Muon for matrices, AdamW for the rest, one global clip; and weight averaging.  docs/spec.md §3
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/gpt.h"

namespace pgolf {

struct StepSettings {  // the host's side of StepValues: what the schedule decides for one step
  double lr[kGroups];
  double weight_decay[kGroups];
  double beta1, beta2, eps;
  double momentum;
  double clip;
};

struct StepResult {
  double grad_norm;
  bool finite;
};

class Optimizer {
 public:
  Optimizer(std::shared_ptr<GPT> model, int ns_steps);

  // Applies the gradients that stand in the model. Where they are not finite, nothing changes.
  StepResult step(const StepSettings& settings);

  std::int64_t steps() const { return steps_; }  // Adam's t
  void set_steps(std::int64_t steps);

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
  std::shared_ptr<GPT> model_;
  int ns_steps_;
  std::int64_t steps_ = 0, snapshots_ = 0;
  ParameterSet first_, second_, average_;  // momentum or m; v; running sum or exponential average
  std::vector<TensorView> grads_;
  std::vector<AdamTensor> adam_;
  std::vector<MuonTensor> muon_;
  DeviceMemory scratch_, values_;
  int concurrency_ = 0;
};

}  // namespace pgolf
