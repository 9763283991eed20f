// The network as a list: which layers compute one after another, and on which streams.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "model/config.h"

namespace pgolf {

// A block of the network, an attention and an MLP. Streams are counted: stream 0 is x0, which every pass mixes in, and
// each pass makes the next one, the last pass that of the head.
struct Pass {
  std::size_t layer;                  // with whose weights it computes
  std::size_t x, out;                 // streams that it reads and makes
  bool pushes;                        // out, for a later pass to pop
  std::optional<std::size_t> popped;  // a stream that it mixes in as well …
  std::size_t skip;                   // … times this row of skip_weights
};

// docs/spec.md §2.3
std::vector<Pass> passes_of(const ModelConfig& config, bool looping);

}  // namespace pgolf
