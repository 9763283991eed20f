// The model: gradients against differences, bits against the number of threads, and a loss that falls.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"
#include "model/decode.h"
#include "model/gpt.h"
#include "optim/optimizer.h"

namespace pgolf::test {
namespace {

constexpr std::int64_t kBatch = 2, kLength = 9, kTokens = kBatch * kLength;

ModelConfig small() {
  ModelConfig c{};
  c.vocab_size = 17;
  c.num_layers = 3;  // an encoder block, two of the decoder, one skip
  c.model_dim = 16;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.mlp_hidden = 24;
  c.tie_embeddings = true;
  c.tied_embed_init_std = 0.1;
  c.logit_softcap = 5.0;
  c.rope_base = 10000.0;
  c.qk_gain_init = 1.5;
  c.bigram_vocab_size = 11;
  c.bigram_dim = 6;
  c.bos_id = 1;
  return c;
}

std::unique_ptr<Backend> backend(DType dtype) { return make_cpu_backend(dtype, dtype); }

struct Batch {
  std::vector<std::int32_t> ids, targets;

  Batch() {
    const TensorRandom dice(3, "batch");
    for (std::uint64_t i = 0; i < kTokens; ++i) {
      ids.push_back(static_cast<std::int32_t>(8.5 + dice.uniform(2 * i, 8.5)));
      targets.push_back(static_cast<std::int32_t>(8.5 + dice.uniform(2 * i + 1, 8.5)));
    }
  }
};

std::vector<double> numbers(const GPT& model, const TensorView& t) {
  std::vector<double> values(static_cast<std::size_t>(t.size()));
  if (t.dtype == DType::f64) {
    model.backend().download(values.data(), t.data, t.bytes());
  } else {
    std::vector<float> narrow(values.size());
    model.backend().download(narrow.data(), t.data, t.bytes());
    std::copy(narrow.begin(), narrow.end(), values.begin());
  }
  return values;
}

void write(GPT& model, const TensorView& t, const std::vector<double>& values) {
  if (t.dtype == DType::f64) {
    model.backend().upload(t.data, values.data(), t.bytes());
  } else {
    const std::vector<float> narrow(values.begin(), values.end());
    model.backend().upload(t.data, narrow.data(), t.bytes());
  }
  model.weights_changed();
}

// Weights of which none is zero: a parameter that starts at zero would hide the gradients behind it.
void shake(GPT& model) {
  for (std::size_t i = 0; i < model.table().size(); ++i) {
    const TensorRandom dice(5, model.table()[i].name);
    std::vector<double> values(static_cast<std::size_t>(model.table()[i].size()));
    for (std::size_t j = 0; j < values.size(); ++j) values[j] = 0.5 * dice.normal(j);
    write(model, model.weights()[i], values);
  }
}

// A whole step but for the optimizer; returns the mean loss.
double gradients(GPT& model, const Batch& batch) {
  model.begin_step(false);
  model.micro_step(batch.ids.data(), batch.targets.data(), kBatch, kLength, 1.0 / double(kTokens));
  model.end_step();
  return model.loss_sum() / double(kTokens);
}

double mean_loss(GPT& model, const Batch& batch) {
  std::vector<double> losses(kTokens);
  model.losses(batch.ids.data(), batch.targets.data(), kBatch, kLength, 0, losses.data());
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum / double(kTokens);
}

// For every parameter, the slope along a random direction.
void gradients_equal_differences() {
  for (const bool tied : {true, false}) {
    ModelConfig config = small();
    config.tie_embeddings = tied;
    config.smear_reset_at_bos = !tied;
    GPT model(config, backend(DType::f64), 1);
    shake(model);
    const Batch batch;
    CHECK_NEAR(gradients(model, batch), mean_loss(model, batch), 1e-12);
    for (std::size_t i = 0; i < model.table().size(); ++i) {
      const TensorView& w = model.weights()[i];
      const std::vector<double> start = numbers(model, w);
      const std::vector<double> gradient = numbers(model, model.grads()[i]);
      const TensorRandom dice(7, model.table()[i].name);
      constexpr double kStep = 1e-5;
      double slope = 0, size = 0, sides[2];
      for (int side = 0; side < 2; ++side) {
        std::vector<double> moved = start;
        for (std::size_t j = 0; j < moved.size(); ++j) moved[j] += (side ? kStep : -kStep) * dice.normal(j);
        write(model, w, moved);
        sides[side] = mean_loss(model, batch);
      }
      write(model, w, start);
      for (std::size_t j = 0; j < gradient.size(); ++j) {
        slope += gradient[j] * dice.normal(j);
        size += std::abs(gradient[j]);
      }
      CHECK_EQUAL(size > 0, true);
      // Third derivatives and rounding: 1e-10·loss''' and 1e-16/1e-5.
      CHECK_NEAR(slope, (sides[1] - sides[0]) / (2 * kStep), 1e-7 * std::max(1.0, size));
    }
  }
}

void same_bits_for_any_number_of_threads() {
  const Batch batch;
  std::vector<std::vector<double>> first;
  for (const int count : {1, 2, 3}) {
    set_thread_count(count);
    GPT model(small(), backend(DType::f32), 1);
    shake(model);
    gradients(model, batch);
    for (std::size_t i = 0; i < model.table().size(); ++i) {
      const std::vector<double> gradient = numbers(model, model.grads()[i]);
      if (count == 1)
        first.push_back(gradient);
      else
        CHECK_EQUAL(std::memcmp(first[i].data(), gradient.data(), gradient.size() * sizeof(double)), 0);
    }
  }
}

StepSettings settings() {
  StepSettings s{};
  s.lr[kMatrix] = 0.02;
  s.lr[kEmbedding] = s.lr[kScalar] = s.lr[kHead] = 0.02;
  s.weight_decay[kMatrix] = 0.01;
  s.beta1 = 0.9;
  s.beta2 = 0.95;
  s.eps = 1e-8;
  s.momentum = 0.9;
  s.clip = 1.0;
  return s;
}

void training_learns_a_batch(DType master, DType rounding) {
  const auto model = std::make_shared<GPT>(small(), make_cpu_backend(master, rounding), 1);
  Optimizer optimizer(model, 5);
  const Batch batch;
  const double before = gradients(*model, batch);
  const auto step = [&] { return optimizer.wait(optimizer.step(settings())); };
  step();
  gradients(*model, batch);
  step();
  const auto allocations = allocation_count();
  for (int steps = 2; steps < 60; ++steps) {
    gradients(*model, batch);
    CHECK_EQUAL(step().finite, true);
  }
  CHECK_EQUAL(allocation_count(), allocations);
  CHECK_EQUAL(gradients(*model, batch) < 0.5 * before, true);
}

// Read token by token, in room that grows, a text has the logits of a pass over all of it.
void kept_keys_and_values_give_the_same_logits() {
  const auto model = std::make_shared<GPT>(small(), backend(DType::f64), 1);
  shake(*model);
  const Batch batch;
  const auto V = static_cast<std::size_t>(small().vocab_size);
  std::vector<double> all(V * kLength), next(V);
  model->logits(batch.ids.data(), 1, kLength, 0, all.data());
  Decoder decoder(model, 2);
  for (std::int64_t t = 0; t < kLength; ++t) {
    decoder.read(batch.ids.data() + t, 1, next.data());
    for (std::size_t i = 0; i < V; ++i) CHECK_NEAR(next[i], all[static_cast<std::size_t>(t) * V + i], 1e-12);
  }
  CHECK_EQUAL(decoder.length(), kLength);
  CHECK_EQUAL(decoder.room(), std::int64_t{16});
}

void impossible_models_are_refused() {
  ModelConfig config = small();
  config.num_kv_heads = 3;
  std::string message;
  try {
    GPT model(config, backend(DType::f32), 1);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK_EQUAL(message, "model.num_heads is 4; it must be a multiple of num_kv_heads, 3.");
}

}  // namespace

void test_model() {
  gradients_equal_differences();
  same_bits_for_any_number_of_threads();
  training_learns_a_batch(DType::f64, DType::f64);
  training_learns_a_batch(DType::f32, DType::f32);
  training_learns_a_batch(DType::f32, DType::bf16);
  training_learns_a_batch(DType::f32, DType::f16);
  kept_keys_and_values_give_the_same_logits();
  impossible_models_are_refused();
}

}  // namespace pgolf::test
