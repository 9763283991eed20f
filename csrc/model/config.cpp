#include "model/config.h"

#include <cmath>

#include "core/error.h"

namespace pgolf {

void ModelConfig::validate() const {
  const auto at_least = [](const char* field, std::int64_t value, std::int64_t least) {
    require(value >= least, "model.", field, " is ", value, "; it must be at least ", least, ".");
  };
  at_least("vocab_size", vocab_size, 2);
  at_least("num_layers", num_layers, 1);
  at_least("model_dim", model_dim, 2);
  at_least("num_heads", num_heads, 1);
  at_least("num_kv_heads", num_kv_heads, 1);
  at_least("mlp_hidden", mlp_hidden, 1);
  at_least("bigram_dim", bigram_dim, 1);
  require(model_dim % num_heads == 0 && head_dim() % 2 == 0, "model.model_dim is ", model_dim, " and model.num_heads ",
          num_heads, "; a head's width must be an even whole number.");
  require(num_heads % num_kv_heads == 0, "model.num_heads is ", num_heads, "; it must be a multiple of num_kv_heads, ",
          num_kv_heads, ".");
  require(bigram_vocab_size == 0 || bigram_vocab_size >= 2, "model.bigram_vocab_size is ", bigram_vocab_size,
          "; it must be 0 (no bigram table) or at least 2.");
  require(logit_softcap > 0, "model.logit_softcap is ", logit_softcap, "; it must be above 0.");
  require(rope_base > 0, "model.rope_base is ", rope_base, "; it must be above 0.");
}

std::vector<ParameterSpec> parameter_table(const ModelConfig& c) {
  std::vector<ParameterSpec> table;
  const std::int64_t d = c.model_dim, F = c.mlp_hidden, kv = c.num_kv_heads * c.head_dim();
  const auto add = [&](std::string name, std::vector<std::int64_t> shape, Group group, Init init, double value = 0,
                       int qat_clip = 0, std::string scale = {}) {
    table.push_back({std::move(name), std::move(shape), group, init, value, qat_clip, std::move(scale)});
  };

  add("tok_emb.weight", {c.vocab_size, d}, kEmbedding, Init::normal, c.tie_embeddings ? c.tied_embed_init_std : 1.0);
  if (c.has_bigram()) {
    add("bigram.embed.weight", {c.bigram_vocab_size, c.bigram_dim}, kEmbedding, Init::zero);
    if (c.has_bigram_proj())
      add("bigram.proj.weight", {d, c.bigram_dim}, kMatrix, Init::orthogonal,
          1.0 / std::sqrt(2.0 * static_cast<double>(c.num_layers)));
    add("bigram.scale", {}, kScalar, Init::constant, 0.05);
  }
  add("smear.gate", {d}, kScalar, Init::zero);
  add("skip_weights", {c.num_skips(), d}, kScalar, Init::one);
  constexpr int kInt5 = 15, kInt6 = 31;
  for (std::int64_t i = 0; i < c.num_layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    add(block + "resid_mix", {2, d}, kScalar, Init::residual_mix);
    add(block + "attn_scale", {d}, kScalar, Init::one);
    add(block + "mlp_scale", {d}, kScalar, Init::one);
    add(block + "attn.c_q.weight", {d, d}, kMatrix, Init::orthogonal, 1.0, kInt6);
    add(block + "attn.c_k.weight", {kv, d}, kMatrix, Init::orthogonal, 1.0, kInt6);
    add(block + "attn.c_v.weight", {kv, d}, kMatrix, Init::orthogonal, 1.0, kInt6);
    add(block + "attn.proj.weight", {d, d}, kMatrix, Init::zero, 0, kInt6, block + "attn_scale");
    add(block + "attn.q_gain", {c.num_heads}, kScalar, Init::constant, c.qk_gain_init);
    add(block + "mlp.fc.weight", {F, d}, kMatrix, Init::orthogonal, 1.0, kInt5);
    add(block + "mlp.proj.weight", {d, F}, kMatrix, Init::zero, 0, kInt5, block + "mlp_scale");
  }
  if (!c.tie_embeddings) add("lm_head.weight", {c.vocab_size, d}, kHead, Init::zero);
  return table;
}

}  // namespace pgolf
