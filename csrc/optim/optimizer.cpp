#include "optim/optimizer.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"

namespace pgolf {

Optimizer::Optimizer(std::shared_ptr<GPT> model, const MuonRule& rule) : model_(std::move(model)), rule_(rule) {
  Backend& backend = model_->backend();
  const auto& table = model_->table();
  model_->begin_step(false);  // makes the gradients
  first_.allocate(backend, table, backend.master_dtype());
  std::vector<ParameterSpec> adam_table = table;
  for (ParameterSpec& spec : adam_table)
    if (spec.group == kMatrix) spec.shape = {0};  // Muon has one moment
  second_.allocate(backend, adam_table, backend.master_dtype());
  for (std::size_t i = 0; i < table.size(); ++i) {
    const TensorView &w = model_->weights()[i], &grad = model_->grads()[i];
    if (w.size() == 0) continue;
    grads_.push_back(grad);
    if (table[i].group == kMatrix)
      muon_.push_back({w, grad, first_[i]});
    else
      adam_.push_back({w, grad, first_[i], second_[i], table[i].group});
  }
  // The most expensive matrices first, so that the last ones even out the threads.
  std::stable_sort(muon_.begin(), muon_.end(), [](const MuonTensor& a, const MuonTensor& b) {
    const auto cost = [](const MuonTensor& t) { return t.w.size() * std::min(t.w.shape[0], t.w.shape[1]); };
    return cost(a) > cost(b);
  });
}

Optimizer::~Optimizer() {
  if (recording_) model_->backend().forget(recording_);
}

int Optimizer::step(const StepSettings& settings) {
  NativeCall call;
  Backend& backend = model_->backend();
  if (concurrency_ != backend.concurrency()) {
    concurrency_ = backend.concurrency();
    scratch_.reserve(backend, backend.muon_scratch(muon_));
  }
  StepValues* values = model_->values();
  backend.upload(values, &settings, sizeof settings);
  const auto work = [&] {
    backend.grad_norm(grads_, values);
    backend.adam(adam_, values);
    backend.muon(muon_, rule_, values, scratch_.data());
  };
  recording_ = backend.capture(recording_, std::cref(work));
  model_->weights_changed();
  return backend.read_later(values, sizeof *values);
}

StepResult Optimizer::wait(int ticket) {
  static_assert(sizeof(StepValues) <= Backend::kReadBytes);
  StepValues values;
  model_->backend().wait(ticket, &values, sizeof values);
  return {values.loss_sum, values.grad_norm, values.finite != 0, values.saturated, std::max(0, -values.clean)};
}

void Optimizer::go_on() {
  StepValues values = read_values();
  values.stopped = 0;
  model_->backend().upload(model_->values(), &values, sizeof values);
}

StepValues Optimizer::read_values() const {
  StepValues values;
  model_->backend().download(&values, model_->values(), sizeof values);
  return values;
}

StepCounts Optimizer::counts() const {
  const StepValues values = read_values();
  return {values.adam_steps, values.loss_scale, values.clean};
}

void Optimizer::set_counts(const StepCounts& counts) {
  require(counts.adam_steps >= 0, "Adam's step count is ", counts.adam_steps, "; it cannot be negative.");
  constexpr std::int64_t kMost = 1 << 30;
  require(counts.clean > -kMost && counts.clean < kMost, "The steps since the loss scale changed are ", counts.clean,
          ", which no run has taken.");
  require(counts.loss_scale > 0, "The loss scale is ", counts.loss_scale, "; it must be above 0.");
  StepValues values = read_values();
  values.adam_steps = counts.adam_steps;
  values.clean = static_cast<std::int32_t>(counts.clean);
  if (values.scaling) values.loss_scale = counts.loss_scale;
  values.stopped = 0;
  model_->backend().upload(model_->values(), &values, sizeof values);
}

void Optimizer::warm_up(const std::vector<std::int64_t>& batches, std::int64_t T, double loss_scale, bool qat,
                        bool looping, bool averaging) {
  const StepValues before = read_values();
  StepValues idle = before;
  idle.stopped = 1;  // no weight or moment changes
  model_->backend().upload(model_->values(), &idle, sizeof idle);
  const bool looped = model_->looping();
  const int loops = looping ? 2 : 1;
  for (int variant = 0; variant < (qat ? 2 : 1) * loops; ++variant) {
    if (looping) model_->set_looping(variant % 2 != 0);
    model_->begin_step(variant >= loops);
    for (const std::int64_t B : batches) {
      const std::vector<std::int32_t> ids(static_cast<std::size_t>(B * T), 0);
      model_->micro_step(ids.data(), ids.data(), B, T, loss_scale);
    }
    model_->end_step();
    wait(step(before));
  }
  model_->set_looping(looped);
  if (averaging) {
    average_.allocate(model_->backend(), model_->table(), model_->backend().master_dtype());
    model_->backend().axpby(1.0, model_->weights().all(), 1.0, average_.all(), model_->values());
  }
  model_->backend().upload(model_->values(), &before, sizeof before);
}

void Optimizer::add_snapshot() {
  average_.allocate(model_->backend(), model_->table(), model_->backend().master_dtype());
  model_->backend().axpby(1.0, model_->weights().all(), 1.0, average_.all(), model_->values());
  ++snapshots_;
}

void Optimizer::set_snapshots(std::int64_t count) {
  require(count >= 0, "The number of snapshots is ", count, "; it cannot be negative.");
  if (count > 0) average_.allocate(model_->backend(), model_->table(), model_->backend().master_dtype());
  snapshots_ = count;
}

void Optimizer::use_snapshot_mean() {
  require(snapshots_ > 0, "There is no snapshot to average.");
  model_->backend().axpby(1.0 / static_cast<double>(snapshots_), average_.all(), 0.0, model_->weights().all(), nullptr);
  model_->weights_changed();
}

void Optimizer::start_ema() {
  average_.allocate(model_->backend(), model_->table(), model_->backend().master_dtype());
  model_->backend().copy(average_.all(), model_->weights().all());
}

void Optimizer::update_ema(double decay) {
  require(average_.allocated(), "update_ema needs start_ema before it.");
  model_->backend().axpby(1.0 - decay, model_->weights().all(), decay, average_.all(), model_->values());
}

void Optimizer::use_ema() {
  require(average_.allocated(), "use_ema needs start_ema before it.");
  model_->backend().copy(model_->weights().all(), average_.all());
  model_->weights_changed();
}

std::vector<Optimizer::State> Optimizer::state() const {
  std::vector<State> states;
  const auto& table = model_->table();
  for (std::size_t i = 0; i < table.size(); ++i) {
    const bool matrix = table[i].group == kMatrix;
    states.push_back({(matrix ? "momentum." : "adam_m.") + table[i].name, first_[i]});
    if (!matrix) states.push_back({"adam_v." + table[i].name, second_[i]});
    if (average_.allocated()) states.push_back({"average." + table[i].name, average_[i]});
  }
  return states;
}

std::size_t Optimizer::bytes() const { return first_.bytes() + second_.bytes() + average_.bytes() + scratch_.bytes(); }

}  // namespace pgolf
