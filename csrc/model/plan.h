// The operations of one pass over B×T tokens with every tensor placed: what gpt.cpp runs.
#pragma once

#include <vector>

#include "core/arena.h"
#include "model/gpt.h"

namespace pgolf {

struct LayerOps {
  Qkv qkv;
  Attention attention;
  ProjectResidual attention_out;
  MlpUp mlp_up;
  ProjectResidual mlp_out;
  // Training only:
  QkvGrads qkv_grads;
  AttentionGrads attention_grads;
  ProjectResidualGrads attention_out_grads;
  MlpUpGrads mlp_up_grads;
  ProjectResidualGrads mlp_out_grads;
};

struct GPT::Plan {
  Mode mode = Mode::losses;
  std::int64_t B = 0, T = 0, first = 0;
  int concurrency = 0;          // the backend's when the scratch was sized
  bool fake_quantized = false;  // which weights the operations are bound to
  ArenaPlan arena;
  DeviceMemory memory;

  TensorView ids, targets;
  Embed embed;
  std::vector<LayerOps> layers;
  Head head;
  // Training only:
  EmbedGrads embed_grads;
  HeadGrads head_grads;

  // Declares every tensor of the pass and places it; operations must be bound to their parameters already.
  void lay_out(const ModelConfig& config, Backend& backend);
};

}  // namespace pgolf
