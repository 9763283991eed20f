#include "model/plan.h"

#include <algorithm>

#include "model/rope.h"

namespace pgolf {
namespace {

// Ticks: the embedding is 0, layer i has five from 1 + 5i, the head is the turning point; the backward of an
// operation at tick f happens at 2·head − f.
enum Op { kQkv, kAttention, kAttentionOut, kMlpUp, kMlpOut, kOps };

struct Clock {
  int head;
  bool train;
  int at(std::int64_t layer, Op op) const { return 1 + kOps * static_cast<int>(layer) + op; }
  int back(int tick) const { return 2 * head - tick; }
  int end() const { return train ? 2 * head : head; }
  // When a tensor dies that forward reads last at `forward` and backward at the backward of `saver`.
  int until(int forward, int saver) const { return train ? back(saver) : forward; }
};

// Declares tensors with their lifetimes; views have no data until the arena has a base.
class Placer {
 public:
  explicit Placer(ArenaPlan& arena) : arena_(arena) {}

  int declare(const char* name, int first, int last, const TensorView& shape) {
    const int index = arena_.add(name, shape.bytes(), first, last);
    shapes_.resize(static_cast<std::size_t>(index) + 1);
    shapes_[static_cast<std::size_t>(index)] = shape;
    return index;
  }
  void area(const char* name, int first, int last, std::size_t bytes, TensorView* user) {
    areas_.push_back({declare(name, first, last, TensorView(DType::u8, {static_cast<std::int64_t>(bytes)})), user});
  }
  TensorView view(int index) const {
    if (index < 0) return {};
    TensorView tensor = shapes_[static_cast<std::size_t>(index)];
    if (!places_.empty()) tensor.data = places_[static_cast<std::size_t>(index)];
    return tensor;
  }
  // All buffers in one block, buffers that are never alive together in the same place.
  void place(char* base) {
    for (std::size_t i = 0; i < shapes_.size(); ++i) places_.push_back(base + arena_.offset(static_cast<int>(i)));
    hand_out();
  }
  // A block for each buffer: a memory checker sees what reads too far.
  std::vector<DeviceMemory> place_apart(Backend& backend) {
    std::vector<DeviceMemory> blocks(shapes_.size());
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      blocks[i].reserve(backend, arena_.buffers()[i].bytes);
      places_.push_back(blocks[i].data());
    }
    hand_out();
    return blocks;
  }

 private:
  void hand_out() {
    for (const auto& [index, user] : areas_) *user = view(index);
  }

  ArenaPlan& arena_;
  std::vector<char*> places_;
  std::vector<TensorView> shapes_;
  std::vector<std::pair<int, TensorView*>> areas_;
};

// `count` rows of an axis before which there is none, or one of length 1, from the first-th on.
TensorView part_of(const TensorView& t, int axis, std::int64_t first, std::int64_t count) {
  const std::size_t row = t.bytes() / static_cast<std::size_t>(t.shape[axis]);
  TensorView part = t;
  part.shape[axis] = count;
  if (t.data) part.data = static_cast<char*>(t.data) + static_cast<std::size_t>(first) * row;
  return part;
}

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
  const RopeTables tables = rope_tables(cos.shape[0], config.head_dim(), config.rope_base, config.rope_tables_bf16);
  upload_rope(backend, tables.cos, cos);
  upload_rope(backend, tables.sin, sin);
}

void GPT::Plan::forget_recordings() noexcept {
  for (int& r : recording)
    if (r) recorder->forget(std::exchange(r, 0));
}

void GPT::Plan::move_to(std::int64_t position) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    LayerOps& l = layers[i];
    l.qkv.cos = part_of(cos, 0, position, T);
    l.qkv.sin = part_of(sin, 0, position, T);
    l.qkv.k = part_of(cache[i].k, 1, position, T);
    l.qkv.v = part_of(cache[i].v, 1, position, T);
    l.attention.k = part_of(cache[i].k, 1, 0, position + T);
    l.attention.v = part_of(cache[i].v, 1, 0, position + T);
  }
}

void GPT::Plan::lay_out(const ModelConfig& c, Backend& backend, bool place) {
  const DType real = backend.dtype(), master = backend.master_dtype();
  const std::int64_t d = c.model_dim, H = c.num_heads, K = c.num_kv_heads, D = c.head_dim(), L = c.num_layers;
  const std::int64_t encoders = c.encoder_layers();
  const TensorView wide(real, {B, T, d}), keys(real, {B, T, K, D});
  const TensorView tokens(DType::i32, {B, before + T}), embedded(real, {B, before + T, d}), angles(master, {T, D / 2});
  const bool train = mode == Mode::train || mode == Mode::adapt, embeds = mode == Mode::train;
  // Of the last block, only keys and values are needed at positions before `first`, unless there is a backward.
  const std::int64_t scored = train ? T : T - first;
  const auto rows = [&](std::int64_t layer) { return layer == L - 1 ? scored : T; };
  const Clock clock{1 + kOps * static_cast<int>(L), train};
  concurrency = backend.concurrency();
  arena = ArenaPlan();
  Placer placer(arena);

  // An encoder block's output, x[i + 1] of block i, is popped by a later block: −1 where nothing is popped.
  const auto popped_by = [&](std::int64_t block) {
    return block >= encoders && block < 2 * encoders ? 2 * encoders - block : -1;
  };
  const auto popper_of = [&](std::int64_t x) { return x >= 1 && x <= encoders ? 2 * encoders - x : x; };

  // ---- Tensors. x[i] is block i's input (x[0] = x0), x[L] the head's.
  struct Layer {
    int x, q, k, v, o, x_mid, h;
    int d_o = -1, dqkv = -1, du = -1, dskip = -1;
  };
  std::vector<Layer> t(static_cast<std::size_t>(L) + 1);
  const int id_tensor = placer.declare("token ids", 0, clock.end(), tokens);
  const int target_tensor = placer.declare("targets", 0, clock.end(), TensorView(DType::i32, {B, scored}));
  const int own_cos = cos ? -1 : placer.declare("rope tables", 0, clock.end(), angles);
  const int own_sin = cos ? -1 : placer.declare("rope tables", 0, clock.end(), angles);
  for (std::int64_t i = 0; i <= L; ++i) {
    const int made = i == 0 ? 0 : clock.at(i - 1, kMlpOut);
    const int last = i == 0   ? clock.end()
                     : i == L ? clock.head
                              : clock.until(clock.at(popper_of(i), kAttentionOut), clock.at(i, kQkv));
    t[static_cast<std::size_t>(i)].x =
        placer.declare("block inputs", made, last, i == 0 ? embedded : TensorView(real, {B, rows(i - 1), d}));
  }
  for (std::int64_t i = 0; i < L; ++i) {
    Layer& l = t[static_cast<std::size_t>(i)];
    const int qkv = clock.at(i, kQkv), attention = clock.at(i, kAttention), attention_out = clock.at(i, kAttentionOut);
    const int mlp_up = clock.at(i, kMlpUp), mlp_out = clock.at(i, kMlpOut);
    const TensorView queries(real, {B, rows(i), H, D}), hidden(real, {B, rows(i), c.mlp_hidden});
    l.q = placer.declare("q", qkv, clock.until(attention, attention), queries);
    l.k = cache.empty() ? placer.declare("k", qkv, clock.until(attention, attention), keys) : -1;
    l.v = cache.empty() ? placer.declare("v", qkv, clock.until(attention, attention), keys) : -1;
    l.o = placer.declare("attention outputs", attention, clock.until(attention_out, attention), queries);
    l.x_mid = placer.declare("x between attention and mlp", attention_out, clock.until(mlp_out, mlp_up),
                             TensorView(real, {B, rows(i), d}));
    l.h = placer.declare("mlp hidden", mlp_up, clock.until(mlp_out, mlp_out), hidden);
    if (!train) continue;
    l.du = placer.declare("gradients, mlp", clock.back(mlp_out), clock.back(mlp_up), hidden);
    l.d_o = placer.declare("gradients, attention", clock.back(attention_out), clock.back(attention), queries);
    l.dqkv = placer.declare("gradients, attention", clock.back(attention), clock.back(qkv),
                            TensorView(real, {B, T, H + 2 * K, D}));
    if (const auto skipped = popped_by(i); skipped >= 0)  // kept until the block that read the popped x has its dx
      l.dskip = placer.declare("gradients, skips", clock.back(qkv), clock.back(clock.at(skipped, kQkv)), wide);
  }
  const int dx = train ? placer.declare("gradients, residual", clock.head, clock.end(), wide) : -1;
  const int dx0 =
      embeds ? placer.declare("gradients, residual", clock.head, clock.end(), TensorView(master, {B, T, d})) : -1;
  const int result =
      mode == Mode::logits
          ? placer.declare("logits", clock.head, clock.end(), TensorView(master, {B, T - first, c.vocab_size}))
          : placer.declare("losses", clock.head, clock.end(), TensorView(master, {B, T - first}));

  // ---- Who reads and writes what. Run once without data, so that operations can be asked for their sizes.
  const auto wire = [&] {
    const auto view = [&](int index) { return placer.view(index); };
    const auto input = [&](const Layer& of) {
      return &of == &t[0] && before ? part_of(view(of.x), 1, before, T) : view(of.x);
    };
    ids = embed.ids = view(id_tensor);
    targets = head.targets = view(target_tensor);
    embed.x0 = view(t[0].x);
    for (std::int64_t i = 0; i < L; ++i) {
      LayerOps& l = layers[static_cast<std::size_t>(i)];
      const Layer &at = t[static_cast<std::size_t>(i)], &next = t[static_cast<std::size_t>(i) + 1];
      const auto skipped = popped_by(i);
      const int skip = skipped >= 0 ? t[static_cast<std::size_t>(skipped)].x : -1;
      for (MixedInput* in : {&l.qkv.in, &l.attention_out.mixed}) {
        in->x = input(at);
        in->x0 = input(t[0]);
        in->skip = view(skip);
      }
      l.qkv.cos = cos ? cos : view(own_cos);
      l.qkv.sin = cos ? sin : view(own_sin);
      l.attention.q = l.qkv.q = view(at.q);
      if (cache.empty()) {
        l.attention.k = l.qkv.k = view(at.k);
        l.attention.v = l.qkv.v = view(at.v);
      }
      l.attention.normed = true;
      l.attention_out.a = l.attention.o = view(at.o);
      l.mlp_up.x = l.mlp_out.x = l.attention_out.out = view(at.x_mid);
      l.mlp_out.a = l.mlp_up.h = view(at.h);
      l.mlp_out.out = view(next.x);
      if (!train) continue;
      l.mlp_out_grads.dout = l.mlp_up_grads.dx = l.attention_out_grads.dout = l.qkv_grads.dx = view(dx);
      l.mlp_up_grads.du = l.mlp_out_grads.da = view(at.du);
      l.attention_grads.d_o = l.attention_out_grads.da = view(at.d_o);
      l.qkv_grads.dqkv = l.attention_grads.dqkv = view(at.dqkv);
      l.attention_grads.norms = {l.qkv.cos, l.qkv.sin, l.qkv.saved};
      if (!embeds && i == 0) l.qkv_grads.dx = {};  // nothing below has a gradient
      l.qkv_grads.dx0 = view(dx0);
      l.qkv_grads.dskip = view(at.dskip);
      // What a popped x gets back through its skip joins the dx of the block that read it; block 0, whose input
      // is x0, takes in all that dx0 gathered.
      l.qkv_grads.pending = i == 0          ? view(dx0)
                            : i <= encoders ? view(t[static_cast<std::size_t>(popper_of(i))].dskip)
                                            : TensorView();
    }
    head.x = view(t[static_cast<std::size_t>(L)].x);
    (mode == Mode::logits ? head.logits : head.losses) = view(result);
    head.first = train ? first : 0;  // else x has no other positions
    head_grads.dx = embed_grads.dx0 = view(dx);
    if (!cache.empty()) move_to(cache[0].k.shape[1] - T);  // where attention reads most
  };
  wire();

  // ---- What the operations ask for.
  const auto areas = [&](const OpBytes& bytes, int tick, TensorView* saved, TensorView* scratch,
                         TensorView* back_scratch) {
    placer.area("saved for backward", tick, clock.until(tick, tick), bytes.saved, saved);
    if (!train || tick != clock.head) placer.area("scratch", tick, tick, bytes.forward_scratch, scratch);
    if (train) placer.area("scratch", clock.back(tick), clock.back(tick), bytes.backward_scratch, back_scratch);
  };
  areas(backend.bytes(embed), 0, &embed.saved, &embed.scratch, &embed_grads.scratch);
  for (std::int64_t i = 0; i < L; ++i) {
    LayerOps& l = layers[static_cast<std::size_t>(i)];
    areas(backend.bytes(l.qkv), clock.at(i, kQkv), &l.qkv.saved, &l.qkv.scratch, &l.qkv_grads.scratch);
    areas(backend.bytes(l.attention), clock.at(i, kAttention), &l.attention.saved, &l.attention.scratch,
          &l.attention_grads.scratch);
    areas(backend.bytes(l.attention_out), clock.at(i, kAttentionOut), &l.attention_out.saved, &l.attention_out.scratch,
          &l.attention_out_grads.scratch);
    areas(backend.bytes(l.mlp_up), clock.at(i, kMlpUp), &l.mlp_up.saved, &l.mlp_up.scratch, &l.mlp_up_grads.scratch);
    areas(backend.bytes(l.mlp_out), clock.at(i, kMlpOut), &l.mlp_out.saved, &l.mlp_out.scratch,
          &l.mlp_out_grads.scratch);
  }
  areas(backend.bytes(head), clock.head, &head.saved, &head.scratch, &head_grads.scratch);

  arena_bytes = arena.solve();
  if (!place) return;
  if (separate_buffers()) {
    separate = placer.place_apart(backend);
  } else {
    if (!base) memory.reserve(backend, arena_bytes);
    placer.place(base ? base : memory.data());
  }
  wire();

  if (!cos) upload_rope_tables(c, backend, placer.view(own_cos), placer.view(own_sin));
}

}  // namespace pgolf
