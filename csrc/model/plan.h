// One run of the network over B×T tokens with every tensor placed: a list of passes, forward and backward.
#pragma once

#include <span>
#include <vector>

#include "core/arena.h"
#include "model/gpt.h"
#include "model/passes.h"

namespace pgolf {

// What one pass's attention reads of a sequence's positions 0 … room − 1.
struct KeysValues {
  TensorView k, v;  // [1, room, K, D]
};

struct Plan {
  struct Block {
    Pass pass;
    AttentionSublayer attention;
    MlpSublayer mlp;
    // With a backward only:
    AttentionSublayerGrads attention_grads;
    MlpSublayerGrads mlp_grads;
  };

  const Mode mode;
  const std::int64_t B, T, first;
  int concurrency = 0;  // the backend's when the scratch was sized
  bool qat = false;     // which weights the operations are bound to
  ArenaPlan arena;
  std::size_t arena_bytes = 0;
  DeviceMemory memory;
  char* base = nullptr;                // where it lies if another's memory is used
  std::vector<DeviceMemory> separate;  // with PGOLF_ARENA=separate: a block for every buffer, filled with NaN
  Backend* recorder = nullptr;         // whose recordings these are, of a micro-step without and with QAT
  int recording[2] = {};
  double recorded_loss_scale = 0;
  int runs = 0;  // of inference

  TensorView ids, targets;
  TensorView cos, sin;  // rope tables, if another has them
  // A run over the T tokens that follow others of one sequence (decode.h), whose keys and values another keeps: those
  // of each pass, with room for the T as well. The embedding reads `before` of the tokens that came before.
  std::span<const KeysValues> cache;
  std::int64_t before = 0;
  Embed embed;
  std::vector<Block> blocks;  // in the order of the forward
  Head head;
  // With a backward only:
  EmbedGrads embed_grads;
  HeadGrads head_grads;

  Plan(std::span<const Pass> passes, Mode mode, std::int64_t B, std::int64_t T, std::int64_t first);
  ~Plan() { forget_recordings(); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Declares every tensor and, unless only their size is asked for, places it; operations must be bound to their
  // parameters already (GPT::bind).
  void lay_out(const ModelConfig& config, Backend& backend, bool place);
  void forget_recordings() noexcept;
  // With a cache: the run is over positions `position` … position + T − 1.
  void move_to(std::int64_t position);

  void forward(Backend& backend);   // up to the head
  void backward(Backend& backend);  // from the head's dx on
};

// Tables of angles for positions 0 … cos.shape[0] − 1.
void upload_rope_tables(const ModelConfig& config, Backend& backend, const TensorView& cos, const TensorView& sin);

}  // namespace pgolf
