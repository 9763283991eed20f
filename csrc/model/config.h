// The model's configuration, and every parameter it implies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"

namespace pgolf {

// Field names and meanings are those of the [model] table; validated in Python (pgolf.config) and again here
// as far as memory safety asks.
struct ModelConfig {
  std::int64_t vocab_size, num_layers, model_dim, num_heads, num_kv_heads, mlp_hidden;
  bool ln_scale, tie_embeddings;
  double mlp_negative_slope, tied_embed_init_std, logit_softcap, rope_base, qk_gain_init;
  std::int64_t bigram_vocab_size, bigram_dim;  // n = 0: no bigram table
  std::int64_t rope_dims;                      // 0: whole heads
  // Layers loop_start … loop_end run num_loops times more, one turn after another; num_loops 0: none does.
  std::int64_t loop_start, loop_end, num_loops;
  bool smear_reset_at_bos;
  std::int64_t bos_id;
  bool rope_tables_bf16;

  std::int64_t head_dim() const { return model_dim / num_heads; }
  std::int64_t rope_width() const { return rope_dims ? rope_dims : head_dim(); }
  // The layers in the order in which they run, with their loops or each once.
  std::vector<std::size_t> layer_order(bool looping) const;
  std::int64_t num_skips() const;  // of the longest order: the half of it that pushes
  bool has_bigram() const { return bigram_vocab_size > 0; }
  bool has_bigram_proj() const { return has_bigram() && bigram_dim != model_dim; }

  void validate() const;  // throws std::invalid_argument
};

// How a parameter starts (docs/spec.md §1).
enum class Init { zero, one, constant, normal, orthogonal, residual_mix };

struct ParameterSpec {
  std::string name;  // the community's
  std::vector<std::int64_t> shape;
  Group group;
  Init init;
  double init_value;                 // the constant; the standard deviation; the factor on an orthogonal matrix
  std::optional<std::size_t> scale;  // a projection: the vector that multiplies its rows
  bool mlp_down;                     // its working copy is multiplied by Backend::mlp_down_factor

  std::int64_t size() const {
    std::int64_t n = 1;
    for (auto dim : shape) n *= dim;
    return n;
  }
  TensorView view(DType dtype) const {  // a scalar is [1]
    TensorView view(dtype, {});
    for (auto dim : shape) view.shape[view.rank++] = dim;
    if (shape.empty()) view.rank = 1;
    return view;
  }
};

// All parameters in state-dict order, embeddings, bigram, smear, skips, blocks, head, and where in it each one stands.
struct ParameterTable {
  struct Layer {
    std::size_t resid_mix, wq, wk, wv, wo, q_gain, up, down;
  };

  std::vector<ParameterSpec> specs;
  std::size_t tok_emb, smear_gate, skip_weights, head;
  std::optional<std::size_t> bigram_emb, bigram_proj, bigram_scale;
  std::vector<Layer> layers;
};
ParameterTable parameter_table(const ModelConfig& config);

// The low-rank adapters of test-time training for one operation: its products n·wᵀ that have some.   docs/spec.md §5
struct AdapterSpec {
  std::vector<std::string> names;  // of their a's, which decide how these start
  std::int64_t in;                 // width of n
  std::vector<std::int64_t> outs;  // rows of each w

  std::int64_t numbers() const {  // for each rank
    std::int64_t all = static_cast<std::int64_t>(outs.size()) * in;
    for (auto out : outs) all += out;
    return all;
  }
};
// Those of the queries and values of every place in the layers' order, then those of the head.
std::vector<AdapterSpec> adapter_table(const ModelConfig& config);

// The initial value of a parameter, float32, bit-equal on one platform.
void initialize(const ParameterSpec& spec, std::uint64_t seed, float* out);

}  // namespace pgolf
