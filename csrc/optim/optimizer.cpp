#include "optim/optimizer.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/parallel.h"

namespace pgolf {

Optimizer::Optimizer(std::shared_ptr<GPT> model, int ns_steps) : model_(std::move(model)), ns_steps_(ns_steps) {
  require(ns_steps >= 1, "The number of Newton–Schulz steps is ", ns_steps, "; it must be at least 1.");
  Backend& backend = model_->backend();
  const auto& table = model_->table();
  model_->begin_step(false);  // makes the gradients
  first_.allocate(backend, table);
  std::vector<ParameterSpec> adam_table = table;
  for (ParameterSpec& spec : adam_table)
    if (spec.group == kMatrix) spec.shape = {0};  // Muon has one moment
  second_.allocate(backend, adam_table);
  values_.reserve(backend, sizeof(StepValues));
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

StepResult Optimizer::step(const StepSettings& settings) {
  NativeCall call;
  Backend& backend = model_->backend();
  if (concurrency_ != backend.concurrency()) {
    concurrency_ = backend.concurrency();
    scratch_.reserve(backend, backend.muon_scratch(muon_));
  }
  StepValues values{};
  std::copy(std::begin(settings.lr), std::end(settings.lr), values.lr);
  std::copy(std::begin(settings.weight_decay), std::end(settings.weight_decay), values.weight_decay);
  values.beta1 = settings.beta1;
  values.beta2 = settings.beta2;
  values.eps = settings.eps;
  values.bias1 = 1.0 - std::pow(settings.beta1, static_cast<double>(steps_ + 1));
  values.bias2 = 1.0 - std::pow(settings.beta2, static_cast<double>(steps_ + 1));
  values.momentum = settings.momentum;
  values.clip = settings.clip;

  auto* device_values = reinterpret_cast<StepValues*>(values_.data());
  backend.upload(device_values, &values, sizeof values);
  backend.grad_norm(grads_, device_values);
  backend.adam(adam_, device_values);
  backend.muon(muon_, ns_steps_, device_values, scratch_.data());
  backend.download(&values, device_values, sizeof values);
  if (values.finite) ++steps_;
  return {values.grad_norm, values.finite != 0};
}

void Optimizer::set_steps(std::int64_t steps) {
  require(steps >= 0, "The optimizer's step count is ", steps, "; it cannot be negative.");
  steps_ = steps;
}

void Optimizer::add_snapshot() {
  average_.allocate(model_->backend(), model_->table());
  model_->backend().axpby(1.0, model_->weights().all(), 1.0, average_.all());
  ++snapshots_;
}

void Optimizer::set_snapshots(std::int64_t count) {
  require(count >= 0, "The number of snapshots is ", count, "; it cannot be negative.");
  if (count > 0) average_.allocate(model_->backend(), model_->table());
  snapshots_ = count;
}

void Optimizer::use_snapshot_mean() {
  require(snapshots_ > 0, "There is no snapshot to average.");
  model_->backend().axpby(1.0 / static_cast<double>(snapshots_), average_.all(), 0.0, model_->weights().all());
}

void Optimizer::start_ema() {
  average_.allocate(model_->backend(), model_->table());
  model_->backend().copy(average_.all(), model_->weights().all());
}

void Optimizer::update_ema(double decay) {
  require(average_.allocated(), "update_ema needs start_ema before it.");
  model_->backend().axpby(1.0 - decay, model_->weights().all(), decay, average_.all());
}

void Optimizer::use_ema() {
  require(average_.allocated(), "use_ema needs start_ema before it.");
  model_->backend().copy(model_->weights().all(), average_.all());
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

std::size_t Optimizer::bytes() const {
  return first_.bytes() + second_.bytes() + average_.bytes() + scratch_.bytes() + values_.bytes();
}

}  // namespace pgolf
