#include "model/decode.h"

#include <algorithm>
#include <stdexcept>

#include "core/error.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "model/plan.h"

namespace pgolf {

Decoder::Decoder(std::shared_ptr<GPT> model, std::int64_t positions)
    : model_(std::move(model)), changes_(model_->changes()) {
  require(positions >= 1, "There must be room for at least one token, not for ", positions, ".");
  NativeCall call;
  make_room(positions);
}

Decoder::~Decoder() = default;

// What was read stays, and keeps its bits.
void Decoder::make_room(std::int64_t positions) {
  if (positions <= room_) return;
  const std::int64_t room = std::max(positions, 2 * room_);
  Backend& backend = model_->backend();
  const ModelConfig& c = model_->config();
  std::size_t used = 0;
  const auto take = [&](TensorView view, char* base) {
    view.data = base ? base + used : nullptr;
    used += align_up(view.bytes());
    return view;
  };
  const TensorView angles(backend.master_dtype(), {room, c.head_dim() / 2});
  const TensorView rows(backend.dtype(), {1, room, c.num_kv_heads, c.head_dim()});
  std::vector<KeysValues> cache(model_->passes().size());
  TensorView cos, sin;
  const auto place = [&](char* base) {
    used = 0;
    cos = take(angles, base);
    sin = take(angles, base);
    for (KeysValues& block : cache) block = {take(rows, base), take(rows, base)};
    return used;
  };

  DeviceMemory memory;
  const std::size_t bytes = place(nullptr);
  try {
    memory.reserve(backend, bytes);
  } catch (const DeviceError& error) {
    throw DeviceError(sentence(error.what(), " The keys and values of ", room, " tokens take ", bytes >> 20,
                               " MiB; a shorter text needs less."));
  }
  place(memory.data());
  upload_rope_tables(c, backend, cos, sin);
  for (std::size_t i = 0; i < cache_.size(); ++i)
    for (const auto part : {&KeysValues::k, &KeysValues::v}) {
      TensorView from = cache_[i].*part;
      from.shape[1] = length_;
      backend.copy(cache[i].*part, from);
    }
  plan_.reset();
  memory_.swap(memory);
  cache_ = std::move(cache);
  cos_ = cos;
  sin_ = sin;
  room_ = room;
}

Plan& Decoder::plan_for(std::int64_t before, std::int64_t count) {
  Backend& backend = model_->backend();
  if (plan_ && plan_->before == before && plan_->T == count && plan_->concurrency == backend.concurrency())
    return *plan_;
  plan_.reset();
  auto plan = std::make_unique<Plan>(model_->passes(), Mode::logits, 1, count, count - 1);
  plan->before = before;
  plan->cache = cache_;
  plan->cos = cos_;
  plan->sin = sin_;
  model_->bind(*plan, false);
  plan->lay_out(model_->config(), backend, true);
  plan_ = std::move(plan);
  return *plan_;
}

void Decoder::read(const std::int32_t* ids, std::int64_t count, void* logits) {
  NativeCall call;
  require(count >= 1, "There is no token to read; expected at least one.");
  if (changes_ != model_->changes())
    throw std::runtime_error(
        "The model's weights have changed since the first token of this text was read; begin the text anew.");
  model_->check_ids("ids", ids, 1, count);
  make_room(length_ + count);
  const std::int64_t before = std::min(kBefore, length_);
  Plan& plan = plan_for(before, count);
  model_->ensure_copies(false);

  std::vector<std::int32_t> tokens(last_.end() - before, last_.end());
  tokens.insert(tokens.end(), ids, ids + count);
  Backend& backend = model_->backend();
  backend.upload(plan.ids.data, tokens.data(), plan.ids.bytes());
  plan.move_to(length_);
  plan.forward(backend);
  backend.head_logits(plan.head);
  backend.download(logits, plan.head.logits.data, plan.head.logits.bytes());

  const std::int64_t kept = std::min<std::int64_t>(kBefore, static_cast<std::int64_t>(tokens.size()));
  std::copy(tokens.end() - kept, tokens.end(), last_.end() - kept);
  length_ += count;
}

}  // namespace pgolf
