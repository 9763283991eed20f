#include "model/plan.h"

#include <algorithm>
#include <utility>

#include "model/rope.h"

namespace pgolf {
namespace {

// Ticks: the embedding is 0, then come the steps of every sublayer (SublayerMemory), the head is the turning point; the
// backward of tick f is 2·head − f.
struct Clock {
  int head;
  bool backward;  // follows
  int back(int tick) const { return 2 * head - tick; }
  int end() const { return backward ? back(0) : head; }
  // When a tensor dies that forward reads last at `forward` and backward at the backward of `saver`.
  int until(int forward, int saver) const { return backward ? back(saver) : forward; }
};

// The memory of a sublayer and its ticks.
struct Sublayer {
  SublayerMemory memory;
  int first;
  int last() const { return first + memory.steps - 1; }
  int tick(int step, const Clock& clock) const {
    return step < memory.steps ? first + step : clock.back(first + 2 * memory.steps - 1 - step);
  }
};

// Declares buffers with their lifetimes; pointers to them are handed out when the arena has a place.
class Placer {
 public:
  explicit Placer(ArenaPlan& arena) : arena_(arena) {}

  void declare(const char* name, int first, int last, std::size_t bytes, void** user) {
    arena_.add(name, bytes, first, last);
    users_.push_back(user);
  }
  void declare(const char* name, int first, int last, TensorView* tensor) {
    declare(name, first, last, tensor->bytes(), &tensor->data);
  }
  void declare(const Sublayer& sublayer, const Clock& clock, void** users) {
    for (int i = 0; i < sublayer.memory.count; ++i) {
      const SublayerMemory::Buffer& buffer = sublayer.memory.buffers[i];
      if (buffer.bytes == 0) continue;
      declare(buffer.name, sublayer.tick(buffer.first, clock), sublayer.tick(buffer.last, clock), buffer.bytes,
              users + i);
    }
  }
  // All buffers in one block, buffers that are never alive together in the same place.
  void place(char* base) {
    for (std::size_t i = 0; i < users_.size(); ++i) *users_[i] = base + arena_.offset(static_cast<int>(i));
  }
  // A block for each buffer: a memory checker sees what reads too far.
  std::vector<DeviceMemory> place_apart(Backend& backend) {
    std::vector<DeviceMemory> blocks(users_.size());
    for (std::size_t i = 0; i < users_.size(); ++i) {
      blocks[i].reserve(backend, arena_.buffers()[i].bytes);
      *users_[i] = blocks[i].data();
    }
    return blocks;
  }

 private:
  ArenaPlan& arena_;
  std::vector<void**> users_;
};

void upload_rope(Backend& backend, const std::vector<double>& table, const TensorView& to) {
  if (to.dtype == DType::f64) {
    backend.upload(to.data, table.data(), to.bytes());
  } else {
    const std::vector<float> rounded(table.begin(), table.end());
    backend.upload(to.data, rounded.data(), to.bytes());
  }
}

}  // namespace

void upload_rope_tables(const ModelConfig& config, Backend& backend, const TensorView& cos, const TensorView& sin) {
  const RopeTables tables =
      rope_tables(cos.shape[0], config.head_dim(), config.rope_width(), config.rope_base, config.rope_tables_bf16);
  upload_rope(backend, tables.cos, cos);
  upload_rope(backend, tables.sin, sin);
}

Plan::Plan(std::span<const Pass> passes, Mode run_mode, std::int64_t batch, std::int64_t length, std::int64_t scored)
    : mode(run_mode), B(batch), T(length), first(scored), blocks(passes.size()) {
  for (std::size_t i = 0; i < passes.size(); ++i) blocks[i].pass = passes[i];
}

void Plan::forget_recordings() noexcept {
  for (int& r : recording)
    if (r) recorder->forget(std::exchange(r, 0));
}

void Plan::move_to(std::int64_t position) {
  for (Block& block : blocks) block.attention.position = position;
}

// docs/spec.md §2, top to bottom
void Plan::forward(Backend& backend) {
  backend.embed_forward(embed);
  for (const Block& block : blocks) {
    backend.attention_sublayer_forward(block.attention);
    backend.mlp_sublayer_forward(block.mlp);
  }
}

void Plan::backward(Backend& backend) {
  if (mode == Mode::train) backend.zero(blocks[0].attention_grads.dx0);
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    backend.mlp_sublayer_backward(block->mlp, block->mlp_grads);
    backend.attention_sublayer_backward(block->attention, block->attention_grads);
  }
  if (mode == Mode::train) backend.embed_backward(embed, embed_grads);
}

void Plan::lay_out(const ModelConfig& c, Backend& backend, bool place) {
  const DType real = backend.dtype(), master = backend.master_dtype();
  const std::int64_t d = c.model_dim;
  const TensorView wide(real, {B, T, d}), angles(master, {T, c.head_dim() / 2});
  const bool train = mode == Mode::train || mode == Mode::adapt, embeds = mode == Mode::train;
  // Of the last pass, only keys and values are needed at positions before `first`, unless there is a backward.
  const std::int64_t scored = train ? T : T - first;
  const auto made_by = [&](std::size_t pass) {
    return TensorView(real, {B, pass + 1 == blocks.size() ? scored : T, d});
  };
  concurrency = backend.concurrency();
  arena = ArenaPlan();

  // ---- Tensors that are not a sublayer's own.
  std::vector<TensorView> streams(blocks.size() + 1), between(blocks.size()), dskips(blocks.size());
  streams[0] = TensorView(real, {B, before + T, d});
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    streams[blocks[i].pass.out] = between[i] = made_by(i);
    if (train && blocks[i].pass.popped) dskips[i] = wide;
  }
  TensorView dx, dx0, result;
  if (train) dx = wide;
  if (embeds) dx0 = TensorView(master, {B, T, d});
  result = mode == Mode::logits ? TensorView(master, {B, T - first, c.vocab_size}) : TensorView(master, {B, T - first});
  ids = TensorView(DType::i32, {B, before + T});
  targets = TensorView(DType::i32, {B, scored});
  TensorView own_cos = angles, own_sin = angles;

  // ---- Who reads and writes what. Run once without data, so that sublayers can be asked for their memory.
  const auto wire = [&] {
    const auto read = [&](std::size_t stream) -> Stream {
      return {stream == 0 && before ? part_of(streams[0], 1, before, T) : streams[stream]};
    };
    embed.ids = ids;
    embed.x0 = streams[0];
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const Pass& pass = blocks[i].pass;
      AttentionSublayer& attention = blocks[i].attention;
      attention.x = read(pass.x);
      attention.x0 = read(0);
      if (pass.popped) attention.skip = read(*pass.popped);
      attention.cos = cos ? cos : own_cos;
      attention.sin = sin ? sin : own_sin;
      if (!cache.empty()) {
        attention.k = cache[i].k;
        attention.v = cache[i].v;
      }
      MlpSublayer& mlp = blocks[i].mlp;
      mlp.x = attention.out = {between[i]};
      mlp.out = {streams[pass.out]};
      if (!train) continue;
      blocks[i].mlp_grads.dx = dx;
      AttentionSublayerGrads& grads = blocks[i].attention_grads;
      grads.dx = dx;
      grads.inputs = embeds || i > 0;  // else nothing below has a gradient
      grads.dx0 = dx0;
      grads.dskip = dskips[i];
      // What a popped stream gets back through its skip joins the dx of the pass that made the next stream of it; the
      // first pass, whose stream is x0, takes in all that dx0 gathered.
      if (pass.x == 0) grads.pending = dx0;
      for (std::size_t later = 0; later < blocks.size(); ++later)
        if (blocks[later].pass.popped == pass.x) grads.pending = dskips[later];
    }
    head.x = streams.back();
    head.targets = targets;
    (mode == Mode::logits ? head.logits : head.losses) = result;
    head.first = train ? first : 0;  // else x has no other positions
    head_grads.dx = embed_grads.dx0 = dx;
  };
  wire();

  // ---- What they ask for, and when.
  std::vector<Sublayer> attentions, mlps;
  int tick = 1;
  for (const Block& block : blocks) {
    attentions.push_back({backend.attention_sublayer_memory(block.attention, train), tick});
    tick += attentions.back().memory.steps;
    mlps.push_back({backend.mlp_sublayer_memory(block.mlp, train), tick});
    tick += mlps.back().memory.steps;
  }
  const Clock clock{tick, train};

  Placer placer(arena);
  placer.declare("token ids", 0, clock.end(), &ids);
  placer.declare("targets", 0, clock.end(), &targets);
  if (!cos) {
    placer.declare("rope tables", 0, clock.end(), &own_cos);
    placer.declare("rope tables", 0, clock.end(), &own_sin);
  }
  for (std::size_t s = 0; s < streams.size(); ++s) {
    int made = 0, first_read = clock.head, last_read = s + 1 == streams.size() ? clock.head : 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const Pass& pass = blocks[i].pass;
      if (pass.out == s) made = mlps[i].last();
      if (pass.x != s && pass.popped != s) continue;
      first_read = std::min(first_read, attentions[i].first);
      last_read = std::max(last_read, attentions[i].last());
    }
    placer.declare("block inputs", made, s == 0 ? clock.end() : clock.until(last_read, first_read), &streams[s]);
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    placer.declare(attentions[i], clock, blocks[i].attention.memory);
    placer.declare("x between attention and mlp", attentions[i].last(), clock.until(mlps[i].last(), mlps[i].first),
                   &between[i]);
    placer.declare(mlps[i], clock, blocks[i].mlp.memory);
    if (!dskips[i]) continue;
    const auto reads = [&](const Block& block) { return block.pass.x == *blocks[i].pass.popped; };
    const auto reader = std::find_if(blocks.begin(), blocks.end(), reads) - blocks.begin();
    placer.declare("gradients, skips", clock.back(attentions[i].first),
                   clock.back(attentions[static_cast<std::size_t>(reader)].first), &dskips[i]);
  }
  if (train) placer.declare("gradients, residual", clock.head, clock.end(), &dx);
  if (embeds) placer.declare("gradients, residual", clock.head, clock.end(), &dx0);
  placer.declare(mode == Mode::logits ? "logits" : "losses", clock.head, clock.end(), &result);
  const auto areas = [&](const OpBytes& bytes, int at, TensorView* saved, TensorView* scratch, TensorView* back) {
    const auto area = [&](const char* name, int begin, int end, std::size_t size, TensorView* user) {
      *user = TensorView(DType::u8, {static_cast<std::int64_t>(size)});
      placer.declare(name, begin, end, user);
    };
    area("saved for backward", at, clock.until(at, at), bytes.saved, saved);
    if (!train || at != clock.head) area("scratch", at, at, bytes.forward_scratch, scratch);
    if (train) area("scratch", clock.back(at), clock.back(at), bytes.backward_scratch, back);
  };
  areas(backend.embed_bytes(embed), 0, &embed.saved, &embed.scratch, &embed_grads.scratch);
  areas(backend.head_bytes(head), clock.head, &head.saved, &head.scratch, &head_grads.scratch);

  arena_bytes = arena.solve();
  if (!place) return;
  if (separate_buffers()) {
    separate = placer.place_apart(backend);
  } else {
    if (!base) memory.reserve(backend, arena_bytes);
    placer.place(base ? base : memory.data());
  }
  wire();

  if (!cos) upload_rope_tables(c, backend, own_cos, own_sin);
}

}  // namespace pgolf
