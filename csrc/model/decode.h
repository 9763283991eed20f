// A text that grows: the model reads tokens as they come and gives the logits of the next one.
//
// The keys and values of every position read are kept, past norm and RoPE, so that a new token costs one run over one
// position. Such a run is a Plan like any other: its tensors are a position high, its embedding reads the two tokens
// before as well (the smear gate mixes in the vector of the last one, whose bigram is of the two), and its attention
// has the last T' of T positions as queries.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "model/gpt.h"

namespace pgolf {

struct KeysValues;

class Decoder {
 public:
  // Makes room for `positions` tokens; where a text needs more, the room doubles. Throws DeviceError.
  Decoder(std::shared_ptr<GPT> model, std::int64_t positions);
  ~Decoder();

  // Reads `count` ≥ 1 more tokens, every id in 0 … V−1 (checked), and writes the logits after the last of them: V
  // numbers in host memory, float or double as the backend's master dtype. Throws where the model's weights are no
  // longer those that the tokens before were read with; what is refused is not read.
  void read(const std::int32_t* ids, std::int64_t count, void* logits);

  std::int64_t length() const { return length_; }  // tokens read
  std::int64_t room() const { return room_; }

 private:
  static constexpr std::int64_t kBefore = 2;  // tokens before a position that its embedding reads

  void make_room(std::int64_t positions);
  Plan& plan_for(std::int64_t before, std::int64_t count);

  std::shared_ptr<GPT> model_;
  std::int64_t changes_;  // the model's, when the first token was read
  std::int64_t length_ = 0, room_ = 0;
  std::array<std::int32_t, kBefore> last_{};  // tokens
  DeviceMemory memory_;                       // rope tables, then each block's keys and values
  TensorView cos_, sin_;
  std::vector<KeysValues> cache_;  // a pass each
  std::unique_ptr<Plan> plan_;     // of the last shape: nearly always one token
};

}  // namespace pgolf
