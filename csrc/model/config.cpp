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
  require(rope_dims >= 0 && rope_dims % 2 == 0 && rope_dims <= head_dim(), "model.rope_dims is ", rope_dims,
          "; it must be even and at most a head's width, ", head_dim(), " (0: all of it).");
  require(num_loops >= 0 && num_loops <= 1000, "model.num_loops is ", num_loops, "; it must be from 0 to 1000.");
  require(num_loops == 0 || (0 <= loop_start && loop_start <= loop_end && loop_end < num_layers),
          "model.loop_start is ", loop_start, " and loop_end ", loop_end,
          "; they must be layers, the first not behind the last.");
  require(bigram_vocab_size == 0 || bigram_vocab_size >= 2, "model.bigram_vocab_size is ", bigram_vocab_size,
          "; it must be 0 (no bigram table) or at least 2.");
  require(mlp_negative_slope >= 0, "model.mlp_negative_slope is ", mlp_negative_slope, "; it must be at least 0.");
  require(logit_softcap > 0, "model.logit_softcap is ", logit_softcap, "; it must be above 0.");
  require(rope_base > 0, "model.rope_base is ", rope_base, "; it must be above 0.");
}

std::vector<std::size_t> ModelConfig::layer_order(bool looping) const {
  std::vector<std::size_t> order;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    order.push_back(static_cast<std::size_t>(layer));
    if (!looping || layer != loop_end) continue;
    for (std::int64_t loop = 0; loop < num_loops; ++loop)
      for (std::int64_t again = loop_start; again <= loop_end; ++again)
        order.push_back(static_cast<std::size_t>(again));
  }
  return order;
}

std::int64_t ModelConfig::num_skips() const { return static_cast<std::int64_t>(layer_order(true).size() / 2); }

namespace {

std::string block_name(std::int64_t layer) { return "blocks." + std::to_string(layer) + "."; }

}  // namespace

ParameterTable parameter_table(const ModelConfig& c) {
  ParameterTable table;
  const std::int64_t d = c.model_dim, F = c.mlp_hidden, kv = c.num_kv_heads * c.head_dim();
  const auto add = [&](std::string name, std::vector<std::int64_t> shape, Group group, Init init, double value = 0,
                       std::optional<std::size_t> scale = {}) {
    table.specs.push_back({std::move(name), std::move(shape), group, init, value, scale, false});
    return table.specs.size() - 1;
  };

  table.tok_emb = table.head = add("tok_emb.weight", {c.vocab_size, d}, kEmbedding, Init::normal,
                                   c.tie_embeddings ? c.tied_embed_init_std : 1.0);
  if (c.has_bigram()) {
    table.bigram_emb = add("bigram.embed.weight", {c.bigram_vocab_size, c.bigram_dim}, kEmbedding, Init::zero);
    if (c.has_bigram_proj())
      table.bigram_proj = add("bigram.proj.weight", {d, c.bigram_dim}, kMatrix, Init::orthogonal,
                              1.0 / std::sqrt(2.0 * static_cast<double>(c.num_layers)));
    table.bigram_scale = add("bigram.scale", {}, kScalar, Init::constant, 0.05);
  }
  table.smear_gate = add("smear.gate", {d}, kScalar, Init::zero);
  table.skip_weights = add("skip_weights", {c.num_skips(), d}, kScalar, Init::one);
  for (std::int64_t i = 0; i < c.num_layers; ++i) {
    const std::string block = block_name(i);
    ParameterTable::Layer layer;
    layer.resid_mix = add(block + "resid_mix", {2, d}, kScalar, Init::residual_mix);
    const std::size_t attn_scale = add(block + "attn_scale", {d}, kScalar, Init::one);
    const std::size_t mlp_scale = add(block + "mlp_scale", {d}, kScalar, Init::one);
    layer.wq = add(block + "attn.c_q.weight", {d, d}, kMatrix, Init::orthogonal, 1.0);
    layer.wk = add(block + "attn.c_k.weight", {kv, d}, kMatrix, Init::orthogonal, 1.0);
    layer.wv = add(block + "attn.c_v.weight", {kv, d}, kMatrix, Init::orthogonal, 1.0);
    layer.wo = add(block + "attn.proj.weight", {d, d}, kMatrix, Init::zero, 0, attn_scale);
    layer.q_gain = add(block + "attn.q_gain", {c.num_heads}, kScalar, Init::constant, c.qk_gain_init);
    layer.up = add(block + "mlp.fc.weight", {F, d}, kMatrix, Init::orthogonal, 1.0);
    layer.down = add(block + "mlp.proj.weight", {d, F}, kMatrix, Init::zero, 0, mlp_scale);
    table.specs[layer.down].mlp_down = true;
    table.layers.push_back(layer);
  }
  if (!c.tie_embeddings) table.head = add("lm_head.weight", {c.vocab_size, d}, kHead, Init::zero);
  return table;
}

std::vector<AdapterSpec> adapter_table(const ModelConfig& c) {
  const std::int64_t d = c.model_dim, D = c.head_dim();
  std::vector<AdapterSpec> table;
  std::vector<int> turns(static_cast<std::size_t>(c.num_layers), 0);
  for (const std::size_t layer : c.layer_order(true)) {
    const int turn = turns[layer]++;  // a layer's first place bears its own name
    const std::string attn = block_name(static_cast<std::int64_t>(layer)) + "attn.";
    const std::string a = turn ? ".lora_a." + std::to_string(turn) : ".lora_a";
    table.push_back({{attn + "c_q" + a, attn + "c_v" + a}, d, {c.num_heads * D, c.num_kv_heads * D}});
  }
  table.push_back({{"lm_head.lora_a"}, d, {c.vocab_size}});
  return table;
}

}  // namespace pgolf
