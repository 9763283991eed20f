// The model's configuration, and every parameter it implies.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"

namespace pgolf {

// Field names and meanings are those of the [model] table; validated in Python (pgolf.config) and again here
// as far as memory safety asks.
struct ModelConfig {
  std::int64_t vocab_size, num_layers, model_dim, num_heads, num_kv_heads, mlp_hidden;
  bool tie_embeddings;
  double tied_embed_init_std, logit_softcap, rope_base, qk_gain_init;
  std::int64_t bigram_vocab_size, bigram_dim;  // n = 0: no bigram table
  bool smear_reset_at_bos;
  std::int64_t bos_id;
  bool rope_tables_bf16;

  std::int64_t head_dim() const { return model_dim / num_heads; }
  std::int64_t encoder_layers() const { return num_layers / 2; }
  std::int64_t num_skips() const { return num_layers / 2; }  // min(⌊L/2⌋, L − ⌊L/2⌋) = ⌊L/2⌋
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
  double init_value;  // the constant; the standard deviation; the factor on an orthogonal matrix
  int qat_clip;       // 15, 31, or 0: never fake-quantised
  std::string scale;  // the vector that multiplies this projection's rows; empty: none

  std::int64_t size() const {
    std::int64_t n = 1;
    for (auto dim : shape) n *= dim;
    return n;
  }
};

// In state-dict order: embeddings, bigram, smear, skips, blocks, head.
std::vector<ParameterSpec> parameter_table(const ModelConfig& config);

// The initial value of a parameter, float32, bit-equal on one platform.
void initialize(const ParameterSpec& spec, std::uint64_t seed, float* out);

}  // namespace pgolf
