#include "model/gpt.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "core/error.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "model/plan.h"

namespace pgolf {

namespace {

// The buffers of an arena by name; those of one name may share memory over time.
std::vector<MemoryRow> kinds_of(const ArenaPlan& arena) {
  std::vector<MemoryRow> kinds;
  for (const PlannedBuffer& buffer : arena.buffers()) {
    auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const MemoryRow& r) { return r.what == buffer.name; });
    if (kind == kinds.end()) kind = kinds.insert(kinds.end(), {buffer.name, 0});
    kind->bytes += buffer.bytes;
  }
  return kinds;
}

std::string describe_shortage(const std::string& reason, const ArenaPlan& arena, std::int64_t B, std::int64_t T) {
  std::vector<MemoryRow> kinds = kinds_of(arena);
  std::stable_sort(kinds.begin(), kinds.end(),
                   [](const MemoryRow& a, const MemoryRow& b) { return a.bytes > b.bytes; });
  std::string largest;
  for (std::size_t i = 0; i < std::min<std::size_t>(3, kinds.size()); ++i)
    largest += sentence(i ? ", " : "", kinds[i].what, " ", kinds[i].bytes >> 20, " MiB");
  return sentence(reason, " The pass of ", B, "×", T, " tokens keeps most in: ", largest,
                  ". Fewer sequences at once need less: lower train.micro_batch_seqs (or eval.eval_batch_seqs).");
}

}  // namespace

void DeviceMemory::reserve(Backend& backend, std::size_t bytes) {
  if (bytes <= bytes_) return;
  reset();
  data_ = backend.allocate(bytes);
  backend_ = &backend;
  bytes_ = bytes;
  if (!separate_buffers()) return;
  const std::vector<unsigned char> ones(bytes, 0xFF);  // NaN: what reads before it writes cannot hide it
  backend.upload(data_, ones.data(), bytes);
}

bool separate_buffers() {
  const char* how = std::getenv("PGOLF_ARENA");
  return how && std::string_view(how) == "separate";
}

void DeviceMemory::reset() noexcept {
  if (data_) backend_->release(data_);
  data_ = nullptr;
  bytes_ = 0;
}

void ParameterSet::allocate(Backend& backend, const std::vector<ParameterSpec>& table, DType dtype) {
  if (allocated()) return;
  std::vector<std::size_t> offsets;
  std::size_t bytes = 0;
  for (const ParameterSpec& spec : table) {
    views_.push_back(spec.view(dtype));
    offsets.push_back(bytes);
    bytes += align_up(views_.back().bytes());
  }
  memory_.reserve(backend, bytes);
  for (std::size_t i = 0; i < views_.size(); ++i) views_[i].data = memory_.data() + offsets[i];
  all_ = TensorView(dtype, {static_cast<std::int64_t>(bytes / size_of(dtype))}, memory_.data());
  backend.zero(all_);
}

GPT::GPT(const ModelConfig& config, std::unique_ptr<Backend> backend, std::optional<std::uint64_t> seed)
    : config_(config), backend_(std::move(backend)) {
  config_.validate();
  table_ = parameter_table(config_);
  for (const bool looping : {false, true}) passes_[looping] = passes_of(config_, looping);
  looping_ = config_.num_loops > 0;
  check_heads();
  qat_clips_.assign(table_.specs.size(), 0);
  weights_.allocate(*backend_, table_.specs, backend_->master_dtype());
  std::vector<ParameterSpec> copied = table_.specs;
  for (std::size_t i = 0; i < copied.size(); ++i)
    if (reads(i, false) != Reads::working) copied[i].shape = {0};
  working_.allocate(*backend_, copied, backend_->dtype());
  if (!seed) return;
  const std::vector<ParameterSpec>& specs = table_.specs;
  std::vector<std::vector<float>> values(specs.size());
  parallel_for(static_cast<std::int64_t>(specs.size()), [&](std::int64_t i) {
    const auto at = static_cast<std::size_t>(i);
    values[at].resize(static_cast<std::size_t>(specs[at].size()));
    initialize(specs[at], *seed, values[at].data());
  });
  for (std::size_t i = 0; i < specs.size(); ++i) write(weights_[i], values[i]);
}

// A backend refuses an attention that it cannot compute where it is asked for the bytes: before any are taken.
void GPT::check_heads() const {
  const ParameterTable::Layer& layer = table_.layers[0];
  const DType S = backend_->dtype(), M = backend_->master_dtype();
  AttentionSublayer one;  // of one token
  one.x.x = one.x0.x = one.out.x = TensorView(S, {1, 1, config_.model_dim});
  one.cos = one.sin = TensorView(M, {1, config_.head_dim() / 2});
  one.rope_dims = config_.rope_dims;
  one.resid_mix = table_.specs[layer.resid_mix].view(M);
  one.wq = table_.specs[layer.wq].view(S);
  one.wk = table_.specs[layer.wk].view(S);
  one.wv = table_.specs[layer.wv].view(S);
  one.gain = table_.specs[layer.q_gain].view(M);
  one.wo = table_.specs[layer.wo].view(S);
  (void)backend_->attention_sublayer_memory(one, false);
}

GPT::~GPT() {
  for (int recording : begin_recording_)
    if (recording) backend_->forget(recording);
}

void GPT::write(const TensorView& to, const std::vector<float>& values) {
  if (to.dtype == DType::f32) {
    backend_->upload(to.data, values.data(), to.bytes());
  } else {
    const std::vector<double> wide(values.begin(), values.end());
    backend_->upload(to.data, wide.data(), to.bytes());
  }
}

StepValues* GPT::values() {
  if (values_.bytes() == 0) {
    StepValues start{};
    start.finite = 1;
    start.scaling = backend_->precision() == DType::f16;
    start.loss_scale = start.scaling ? 0x1p16 : 1.0;
    values_.reserve(*backend_, sizeof start);
    backend_->upload(values_.data(), &start, sizeof start);
  }
  return reinterpret_cast<StepValues*>(values_.data());
}

std::size_t GPT::index_of(const std::string& name) const {
  for (std::size_t i = 0; i < table_.specs.size(); ++i)
    if (table_.specs[i].name == name) return i;
  throw std::invalid_argument(sentence("The model has no parameter named ", name, "."));
}

void GPT::check_ids(const char* what, const std::int32_t* ids, std::int64_t B, std::int64_t T) const {
  for (std::int64_t i = 0; i < B * T; ++i)
    require(ids[i] >= 0 && ids[i] < config_.vocab_size, what, "[", i / T, ", ", i % T, "] is ", ids[i],
            "; token ids of this model run from 0 to ", config_.vocab_size - 1, ".");
}

GPT::Reads GPT::reads(std::size_t index, bool qat) const {
  const ParameterSpec& spec = table_.specs[index];
  if (spec.group == kScalar) return Reads::itself;
  if (backend_->rounds() || spec.scale) return Reads::working;
  return qat && qat_clips_[index] ? Reads::quantized : Reads::itself;
}

void GPT::set_qat_clips(const std::vector<int>& clips) {
  require(clips.size() == table_.specs.size(), "There are ", clips.size(), " clips for late QAT; expected ",
          table_.specs.size(), ", one for each parameter.");
  require(copy_list_[1].empty(), "A step with late QAT has begun; its clips are set before the first one.");
  for (std::size_t i = 0; i < clips.size(); ++i)
    require(clips[i] == 0 || (clips[i] > 0 && clips[i] <= 127 && table_.specs[i].group == kMatrix), "The clip of ",
            table_.specs[i].name, " is ", clips[i], "; expected 0, or for a matrix a number up to 127.");
  qat_clips_ = clips;
}

double GPT::copy_factor(std::size_t index) const {
  return table_.specs[index].mlp_down ? backend_->mlp_down_factor() : 1.0;
}

// Makes what products read from the weights as they are now.
void GPT::make_copies(bool qat) {
  std::vector<WorkingCopy>& list = copy_list_[qat];
  if (list.empty()) {
    if (qat && !backend_->rounds() && !quantized_.allocated()) {
      std::vector<ParameterSpec> copied = table_.specs;
      for (std::size_t i = 0; i < copied.size(); ++i)
        if (reads(i, true) != Reads::quantized) copied[i].shape = {0};
      quantized_.allocate(*backend_, copied, backend_->dtype());
    }
    for (std::size_t i = 0; i < table_.specs.size(); ++i) {
      const Reads kind = reads(i, qat);
      if (kind == Reads::itself || weights_[i].size() == 0) continue;
      const ParameterSpec& spec = table_.specs[i];
      list.push_back({weights_[i], spec.scale ? weights_[*spec.scale] : TensorView(), qat ? qat_clips_[i] : 0,
                      copy_factor(i), kind == Reads::working ? working_[i] : quantized_[i]});
    }
  }
  backend_->working_copies(list);
  copies_ = qat ? Copies::qat : Copies::plain;
}

void GPT::ensure_copies(bool qat) {
  if (copies_ != (qat ? Copies::qat : Copies::plain)) make_copies(qat);
}

void GPT::bind(Plan& plan, bool qat) const {
  plan.qat = qat;
  const bool gradients = plan.mode == Mode::train && grads_.allocated();  // not where only a size is asked for
  const auto bind = [&](std::size_t index, TensorView& parameter, TensorView& gradient) {
    const Reads kind = reads(index, qat);
    parameter = kind == Reads::itself ? weights_[index] : kind == Reads::working ? working_[index] : quantized_[index];
    if (gradients) gradient = grads_[index];
  };
  const auto skip_row = [&](const ParameterSet& set, std::size_t row) {
    const TensorView& all = set[table_.skip_weights];
    const std::size_t bytes = static_cast<std::size_t>(config_.model_dim) * size_of(all.dtype);
    return TensorView(all.dtype, {config_.model_dim}, static_cast<char*>(all.data) + row * bytes);
  };

  Embed& embed = plan.embed;
  embed.reset_at_bos = config_.smear_reset_at_bos;
  embed.bos_id = static_cast<std::int32_t>(config_.bos_id);
  bind(table_.tok_emb, embed.tok_emb, plan.embed_grads.tok_emb);
  bind(table_.smear_gate, embed.smear_gate, plan.embed_grads.smear_gate);
  if (table_.bigram_emb) bind(*table_.bigram_emb, embed.bigram_emb, plan.embed_grads.bigram_emb);
  if (table_.bigram_proj) bind(*table_.bigram_proj, embed.bigram_proj, plan.embed_grads.bigram_proj);
  if (table_.bigram_scale) bind(*table_.bigram_scale, embed.bigram_scale, plan.embed_grads.bigram_scale);

  for (auto& [pass, attention, mlp, attention_grads, mlp_grads] : plan.blocks) {
    const ParameterTable::Layer& layer = table_.layers[pass.layer];
    bind(layer.resid_mix, attention.resid_mix, attention_grads.resid_mix);
    if (pass.popped) {
      attention.skip_weight = skip_row(weights_, pass.skip);
      if (gradients) attention_grads.skip_weight = skip_row(grads_, pass.skip);
    }
    bind(layer.wq, attention.wq, attention_grads.wq);
    bind(layer.wk, attention.wk, attention_grads.wk);
    bind(layer.wv, attention.wv, attention_grads.wv);
    bind(layer.q_gain, attention.gain, attention_grads.gain);
    bind(layer.wo, attention.wo, attention_grads.wo);
    attention.rope_dims = config_.rope_dims;
    attention.norm_scale = mlp.norm_scale =
        config_.ln_scale ? 1.0 / std::sqrt(static_cast<double>(pass.layer) + 1.0) : 1.0;
    mlp.negative_slope = config_.mlp_negative_slope;
    bind(layer.up, mlp.up, mlp_grads.up);
    bind(layer.down, mlp.down, mlp_grads.down);
  }
  plan.head.softcap = config_.logit_softcap;
  bind(table_.head, plan.head.w, plan.head_grads.w);
}

// The plans of a shape without loops and with them: they run one at a time, in one arena.
struct RunOfShape {
  Mode mode;
  std::int64_t B, T, first;
  int concurrency;
  DeviceMemory arena;
  DeviceMemory tables;  // RoPE's, where there are two plans: in the arena each would overwrite the other one's
  std::unique_ptr<Plan> plans[2];
};

// A plan with its size, but no place.
std::unique_ptr<Plan> GPT::planned(Mode mode, std::int64_t B, std::int64_t T, std::int64_t first, bool looping) const {
  auto plan = std::make_unique<Plan>(passes_[looping], mode, B, T, first);
  if (config_.num_loops > 0) plan->cos = plan->sin = TensorView(backend_->master_dtype(), {T, config_.head_dim() / 2});
  bind(*plan, false);
  plan->lay_out(config_, *backend_, false);
  return plan;
}

void GPT::set_looping(bool looping) {
  if (config_.num_loops == 0 || looping == looping_) return;
  looping_ = looping;
  ++changes_;
}

Plan& GPT::plan_for(Mode mode, std::int64_t B, std::int64_t T, std::int64_t first) {
  require(B >= 1 && T >= 1, "The batch has shape (", B, ", ", T, "); both sides must be at least 1.");
  require(first >= 0 && first < T, "The first scored position is ", first, "; it must lie in 0 … ", T - 1, ".");
  auto& shapes = mode == Mode::train ? training_ : inference_;
  const auto fits = [&](const std::unique_ptr<RunOfShape>& s) {
    return s->mode == mode && s->B == B && s->T == T && s->first == first && s->concurrency == backend_->concurrency();
  };
  auto found = std::find_if(shapes.begin(), shapes.end(), fits);
  if (found == shapes.end() || !(*found)->plans[looping_]) {
    if (mode == Mode::train) grads_.allocate(*backend_, table_.specs, backend_->master_dtype());
    std::unique_ptr<Plan> plan = planned(mode, B, T, first, looping_);
    try {
      if (found == shapes.end()) {
        constexpr std::size_t kKept = 2;
        auto shape = std::make_unique<RunOfShape>(RunOfShape{mode, B, T, first, backend_->concurrency(), {}, {}, {}});
        if (shapes.size() == kKept) {
          shape->arena.swap(shapes.back()->arena);
          shapes.pop_back();
        }
        std::size_t bytes = plan->arena_bytes;
        if (config_.num_loops > 0) bytes = std::max(bytes, planned(mode, B, T, first, !looping_)->arena_bytes);
        if (!separate_buffers()) shape->arena.reserve(*backend_, bytes);
        if (plan->cos) {
          const std::size_t each = align_up(plan->cos.bytes());
          shape->tables.reserve(*backend_, 2 * each);
          TensorView cos = plan->cos, sin = plan->sin;
          cos.data = shape->tables.data();
          sin.data = shape->tables.data() + each;
          upload_rope_tables(config_, *backend_, cos, sin);
        }
        shapes.reserve(kKept);
        found = shapes.insert(shapes.end(), std::move(shape));
      }
      plan->base = (*found)->arena.data();
      plan->cos.data = (*found)->tables.data();
      if (plan->sin) plan->sin.data = (*found)->tables.data() + align_up(plan->sin.bytes());
      plan->lay_out(config_, *backend_, true);
    } catch (const DeviceError& error) {
      throw DeviceError(describe_shortage(error.what(), plan->arena, B, T));
    }
    (*found)->plans[looping_] = std::move(plan);
  }
  std::rotate(shapes.begin(), found, found + 1);
  Plan& plan = *shapes.front()->plans[looping_];
  const bool wanted = mode == Mode::train && qat_;
  if (plan.qat != wanted && !backend_->rounds()) bind(plan, wanted);  // rounded copies are one set
  return plan;
}

std::size_t GPT::training_bytes(std::int64_t B, std::int64_t T) const {
  std::size_t most = 0;
  for (const bool looping : {false, true}) most = std::max(most, planned(Mode::train, B, T, 0, looping)->arena_bytes);
  return most;
}

void GPT::prepare(Mode mode, std::int64_t B, std::int64_t T) { plan_for(mode, B, T, 0); }

void GPT::logits(const std::int32_t* ids, std::int64_t B, std::int64_t T, std::int64_t first, void* out) {
  NativeCall call;
  Plan& plan = plan_for(Mode::logits, B, T, first);
  check_ids("ids", ids, B, T);
  ensure_copies(false);
  backend_->upload(plan.ids.data, ids, plan.ids.bytes());
  plan.forward(*backend_);
  backend_->head_logits(plan.head);
  backend_->download(out, plan.head.logits.data, plan.head.logits.bytes());
}

Plan& GPT::run_losses(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                      std::int64_t first) {
  Plan& plan = plan_for(Mode::losses, B, T, first);
  check_ids("ids", ids, B, T);
  check_ids("targets", targets, B, T);
  ensure_copies(false);
  backend_->upload(plan.ids.data, ids, plan.ids.bytes());
  if (first == 0) {
    backend_->upload(plan.targets.data, targets, plan.targets.bytes());
  } else {
    std::vector<std::int32_t> scored;
    for (std::int64_t b = 0; b < B; ++b) scored.insert(scored.end(), targets + b * T + first, targets + (b + 1) * T);
    backend_->upload(plan.targets.data, scored.data(), plan.targets.bytes());
  }
  const auto work = [&] {
    plan.forward(*backend_);
    backend_->head_loss(plan.head);
  };
  if (plan.runs++ == 0) {  // a shape that comes once is not worth a recording
    work();
  } else {
    plan.recorder = backend_.get();
    plan.recording[0] = backend_->capture(plan.recording[0], std::cref(work));
  }
  return plan;
}

void GPT::losses(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                 std::int64_t first, void* out) {
  NativeCall call;
  const TensorView losses = run_losses(ids, targets, B, T, first).head.losses;
  backend_->download(out, losses.data, losses.bytes());
}

int GPT::losses_later(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                      std::int64_t first) {
  NativeCall call;
  const TensorView losses = run_losses(ids, targets, B, T, first).head.losses;
  return backend_->read_later(losses.data, losses.bytes());
}

void GPT::begin_step(bool qat) {
  NativeCall call;
  grads_.allocate(*backend_, table_.specs, backend_->master_dtype());
  const TensorView sum(DType::f64, {1}, &values()->loss_sum);
  const TensorView saturated(DType::f64, {1}, &values()->saturated);  // eight bytes of zero, whatever they mean
  qat_ = qat;
  const auto work = [&] {
    backend_->zero(grads_.all());
    backend_->zero(sum);
    backend_->zero(saturated);
    make_copies(qat);
  };
  begin_recording_[qat] = backend_->capture(begin_recording_[qat], std::cref(work));
  copies_ = qat ? Copies::qat : Copies::plain;
}

void GPT::micro_step(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                     double loss_scale) {
  NativeCall call;
  Plan& plan = plan_for(Mode::train, B, T, 0);
  check_ids("ids", ids, B, T);
  check_ids("targets", targets, B, T);
  ensure_copies(qat_);
  backend_->upload(plan.ids.data, ids, plan.ids.bytes());
  backend_->upload(plan.targets.data, targets, plan.targets.bytes());
  if (plan.recorded_loss_scale != loss_scale) plan.forget_recordings();
  plan.recorded_loss_scale = plan.head_grads.loss_scale = loss_scale;
  if (backend_->precision() == DType::f16) {
    plan.head_grads.multiplier = &values()->loss_scale;
    for (Plan::Block& block : plan.blocks) block.mlp.saturated = &values()->saturated;
  }
  plan.recorder = backend_.get();
  const auto work = [&] {
    plan.forward(*backend_);
    backend_->head_loss_backward(plan.head, plan.head_grads);
    plan.backward(*backend_);
    backend_->add_sum(plan.head.losses, &values()->loss_sum);
  };
  plan.recording[qat_] = backend_->capture(plan.recording[qat_], std::cref(work));
}

void GPT::end_step() {
  NativeCall call;
  require(!training_.empty(), "end_step needs at least one micro_step before it.");
  std::vector<ProjectionEnd>& list = end_list_[qat_];
  if (list.empty())
    for (std::size_t i = 0; i < table_.specs.size(); ++i) {
      const ParameterSpec& spec = table_.specs[i];
      if (!spec.scale) continue;
      list.push_back({weights_[i], weights_[*spec.scale], qat_ ? qat_clips_[i] : 0, copy_factor(i), grads_[i],
                      grads_[*spec.scale]});
    }
  backend_->finish_projections(list);
}

double GPT::loss_sum() {
  double sum;
  backend_->download(&sum, &values()->loss_sum, sizeof sum);
  return sum;
}

std::vector<MemoryRow> GPT::memory_table() const {
  std::vector<MemoryRow> rows{{"weights", weights_.bytes()}};
  if (grads_.allocated()) rows.push_back({"gradients", grads_.bytes()});
  rows.push_back({"working copies of weights", working_.bytes() + quantized_.bytes()});
  const auto add_shape = [&](const char* name, const RunOfShape& shape) {
    rows.push_back(
        {sentence(name, " arena, ", shape.B, "×", shape.T, " tokens"), shape.arena.bytes() + shape.tables.bytes()});
    const auto& plan = shape.plans[1] ? shape.plans[1] : shape.plans[0];
    for (MemoryRow& kind : kinds_of(plan->arena)) rows.push_back({"  of it, at some time: " + kind.what, kind.bytes});
  };
  for (const auto& shape : training_) add_shape("training", *shape);
  for (const auto& shape : inference_) add_shape("inference", *shape);
  return rows;
}

}  // namespace pgolf
