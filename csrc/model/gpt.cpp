#include "model/gpt.h"

#include <algorithm>

#include "core/error.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "model/plan.h"

namespace pgolf {

void DeviceMemory::reserve(Backend& backend, std::size_t bytes) {
  if (bytes <= bytes_) return;
  reset();
  data_ = backend.allocate(bytes);
  backend_ = &backend;
  bytes_ = bytes;
}

void DeviceMemory::reset() noexcept {
  if (data_) backend_->release(data_);
  data_ = nullptr;
  bytes_ = 0;
}

void ParameterSet::allocate(Backend& backend, const std::vector<ParameterSpec>& table) {
  if (allocated()) return;
  std::vector<std::size_t> offsets;
  std::size_t bytes = 0;
  for (const ParameterSpec& spec : table) {
    TensorView view;
    view.dtype = backend.dtype();
    view.rank = std::max<int>(1, static_cast<int>(spec.shape.size()));  // a scalar is [1]
    std::copy(spec.shape.begin(), spec.shape.end(), view.shape);
    views_.push_back(view);
    offsets.push_back(bytes);
    bytes += align_up(view.bytes());
  }
  memory_.reserve(backend, bytes);
  for (std::size_t i = 0; i < views_.size(); ++i) views_[i].data = memory_.data() + offsets[i];
  all_ = TensorView(backend.dtype(), {static_cast<std::int64_t>(bytes / size_of(backend.dtype()))}, memory_.data());
  backend.zero(all_);
}

GPT::GPT(const ModelConfig& config, std::unique_ptr<Backend> backend, std::optional<std::uint64_t> seed)
    : config_(config), backend_(std::move(backend)) {
  config_.validate();
  table_ = parameter_table(config_);
  weights_.allocate(*backend_, table_);
  if (!seed) return;
  std::vector<std::vector<float>> values(table_.size());
  parallel_for(static_cast<std::int64_t>(table_.size()), [&](std::int64_t i) {
    const auto at = static_cast<std::size_t>(i);
    values[at].resize(static_cast<std::size_t>(table_[at].size()));
    initialize(table_[at], *seed, values[at].data());
  });
  for (std::size_t i = 0; i < table_.size(); ++i) write(weights_[i], values[i].data());
}

GPT::~GPT() = default;

void GPT::write(const TensorView& to, const float* values) {
  if (to.dtype == DType::f32) {
    backend_->upload(to.data, values, to.bytes());
  } else {
    const std::vector<double> wide(values, values + to.size());
    backend_->upload(to.data, wide.data(), to.bytes());
  }
}

std::size_t GPT::index_of(const std::string& name) const {
  for (std::size_t i = 0; i < table_.size(); ++i)
    if (table_[i].name == name) return i;
  throw std::invalid_argument(sentence("The model has no parameter named ", name, "."));
}

void GPT::check_ids(const char* what, const std::int32_t* ids, std::int64_t B, std::int64_t T) const {
  for (std::int64_t i = 0; i < B * T; ++i)
    require(ids[i] >= 0 && ids[i] < config_.vocab_size, what, "[", i / T, ", ", i % T, "] is ", ids[i],
            "; token ids of this model run from 0 to ", config_.vocab_size - 1, ".");
}

// Points the operations at the parameters: the weights themselves or their fake-quantised copies.
void GPT::bind_parameters(Plan& plan, bool fake_quantized) const {
  plan.fake_quantized = fake_quantized;
  const auto bind = [&](const std::string& name, TensorView& parameter, TensorView* gradient) {
    const std::size_t index = index_of(name);
    parameter = fake_quantized && table_[index].qat_clip ? fake_quantized_[index] : weights_[index];
    if (plan.mode == Mode::train) *gradient = grads_[index];
  };
  const auto skip_row = [&](const ParameterSet& set, std::int64_t j) {
    const TensorView& all = set[index_of("skip_weights")];
    const std::size_t row = static_cast<std::size_t>(config_.model_dim) * size_of(all.dtype);
    return TensorView(all.dtype, {config_.model_dim}, static_cast<char*>(all.data) + static_cast<std::size_t>(j) * row);
  };

  Embed& embed = plan.embed;
  embed.reset_at_bos = config_.smear_reset_at_bos;
  embed.bos_id = static_cast<std::int32_t>(config_.bos_id);
  bind("tok_emb.weight", embed.tok_emb, &plan.embed_grads.tok_emb);
  bind("smear.gate", embed.smear_gate, &plan.embed_grads.smear_gate);
  if (config_.has_bigram()) {
    bind("bigram.embed.weight", embed.bigram_emb, &plan.embed_grads.bigram_emb);
    bind("bigram.scale", embed.bigram_scale, &plan.embed_grads.bigram_scale);
    if (config_.has_bigram_proj()) bind("bigram.proj.weight", embed.bigram_proj, &plan.embed_grads.bigram_proj);
  }

  const std::int64_t encoders = config_.encoder_layers();
  for (std::int64_t i = 0; i < config_.num_layers; ++i) {
    LayerOps& l = plan.layers[static_cast<std::size_t>(i)];
    const std::string block = "blocks." + std::to_string(i) + ".";
    bind(block + "resid_mix", l.qkv.in.resid_mix, &l.qkv_grads.resid_mix);
    if (i >= encoders && i < 2 * encoders) {
      l.qkv.in.skip_weight = skip_row(weights_, i - encoders);
      if (plan.mode == Mode::train) l.qkv_grads.skip_weight = skip_row(grads_, i - encoders);
    }
    l.attention_out.mixed.resid_mix = l.qkv.in.resid_mix;
    l.attention_out.mixed.skip_weight = l.qkv.in.skip_weight;
    bind(block + "attn.c_q.weight", l.qkv.wq, &l.qkv_grads.wq);
    bind(block + "attn.c_k.weight", l.qkv.wk, &l.qkv_grads.wk);
    bind(block + "attn.c_v.weight", l.qkv.wv, &l.qkv_grads.wv);
    bind(block + "attn.q_gain", l.attention.gain, &l.attention_grads.gain);
    bind(block + "attn.proj.weight", l.attention_out.w, &l.attention_out_grads.w);
    bind(block + "attn_scale", l.attention_out.scale, &l.attention_out_grads.scale);
    bind(block + "mlp.fc.weight", l.mlp_up.w, &l.mlp_up_grads.w);
    bind(block + "mlp.proj.weight", l.mlp_out.w, &l.mlp_out_grads.w);
    bind(block + "mlp_scale", l.mlp_out.scale, &l.mlp_out_grads.scale);
  }
  plan.head.softcap = config_.logit_softcap;
  bind(config_.tie_embeddings ? "tok_emb.weight" : "lm_head.weight", plan.head.w, &plan.head_grads.w);
}

GPT::Plan& GPT::plan_for(Mode mode, std::int64_t B, std::int64_t T, std::int64_t first) {
  require(B >= 1 && T >= 1, "The batch has shape (", B, ", ", T, "); both sides must be at least 1.");
  require(first >= 0 && first < T, "The first scored position is ", first, "; it must lie in 0 … ", T - 1, ".");
  auto& plans = mode == Mode::train ? training_ : inference_;
  const auto fits = [&](const std::unique_ptr<Plan>& p) {
    return p->mode == mode && p->B == B && p->T == T && p->first == first && p->concurrency == backend_->concurrency();
  };
  auto found = std::find_if(plans.begin(), plans.end(), fits);
  if (found == plans.end()) {
    constexpr std::size_t kKept = 2;
    auto plan = std::make_unique<Plan>();
    plan->mode = mode;
    plan->B = B;
    plan->T = T;
    plan->first = first;
    plan->layers.resize(static_cast<std::size_t>(config_.num_layers));
    if (plans.size() == kKept) {
      plan->memory.swap(plans.back()->memory);
      plans.pop_back();
    }
    if (mode == Mode::train) grads_.allocate(*backend_, table_);
    bind_parameters(*plan, false);
    plan->lay_out(config_, *backend_);
    plans.reserve(kKept);
    found = plans.insert(plans.end(), std::move(plan));
  }
  std::rotate(plans.begin(), found, found + 1);
  Plan& plan = *plans.front();
  const bool wanted = mode == Mode::train && qat_;
  if (plan.fake_quantized != wanted) bind_parameters(plan, wanted);
  return plan;
}

void GPT::prepare(Mode mode, std::int64_t B, std::int64_t T) { plan_for(mode, B, T, 0); }

// The whole model, top to bottom (docs/spec.md §2).
void GPT::forward(Plan& plan) {
  backend_->embed_forward(plan.embed);
  for (LayerOps& layer : plan.layers) {
    backend_->qkv_forward(layer.qkv);
    backend_->attention_forward(layer.attention);
    backend_->project_residual_forward(layer.attention_out);
    backend_->mlp_up_forward(layer.mlp_up);
    backend_->project_residual_forward(layer.mlp_out);
  }
}

void GPT::backward(Plan& plan) {
  backend_->zero(plan.layers[0].qkv_grads.dx0);
  for (auto layer = plan.layers.rbegin(); layer != plan.layers.rend(); ++layer) {
    backend_->project_residual_backward(layer->mlp_out, layer->mlp_out_grads);
    backend_->mlp_up_backward(layer->mlp_up, layer->mlp_up_grads);
    backend_->project_residual_backward(layer->attention_out, layer->attention_out_grads);
    backend_->attention_backward(layer->attention, layer->attention_grads);
    backend_->qkv_backward(layer->qkv, layer->qkv_grads);
  }
  backend_->embed_backward(plan.embed, plan.embed_grads);
}

void GPT::logits(const std::int32_t* ids, std::int64_t B, std::int64_t T, std::int64_t first, void* out) {
  NativeCall call;
  Plan& plan = plan_for(Mode::logits, B, T, first);
  check_ids("ids", ids, B, T);
  backend_->upload(plan.ids.data, ids, plan.ids.bytes());
  forward(plan);
  backend_->head_logits(plan.head);
  backend_->download(out, plan.head.logits.data, plan.head.logits.bytes());
}

void GPT::losses(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                 std::int64_t first, void* out) {
  NativeCall call;
  Plan& plan = plan_for(Mode::losses, B, T, first);
  check_ids("ids", ids, B, T);
  check_ids("targets", targets, B, T);
  backend_->upload(plan.ids.data, ids, plan.ids.bytes());
  backend_->upload(plan.targets.data, targets, plan.targets.bytes());
  forward(plan);
  backend_->head_loss(plan.head);
  backend_->download(out, plan.head.losses.data, plan.head.losses.bytes());
}

void GPT::begin_step(bool qat) {
  NativeCall call;
  grads_.allocate(*backend_, table_);
  backend_->zero(grads_.all());
  qat_ = qat;
  if (!qat) return;
  fake_quantized_.allocate(*backend_, table_);
  for (std::size_t i = 0; i < table_.size(); ++i)
    if (table_[i].qat_clip) backend_->fake_quantize(weights_[i], fake_quantized_[i], table_[i].qat_clip);
}

double GPT::micro_step(const std::int32_t* ids, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                       double loss_scale) {
  NativeCall call;
  Plan& plan = plan_for(Mode::train, B, T, 0);
  check_ids("ids", ids, B, T);
  check_ids("targets", targets, B, T);
  backend_->upload(plan.ids.data, ids, plan.ids.bytes());
  backend_->upload(plan.targets.data, targets, plan.targets.bytes());
  plan.head_grads.loss_scale = loss_scale;
  forward(plan);
  backend_->head_loss_backward(plan.head, plan.head_grads);
  backward(plan);
  return backend_->sum(plan.head.losses);
}

void GPT::end_step() {
  NativeCall call;
  require(!training_.empty(), "end_step needs at least one micro_step before it.");
  for (const LayerOps& layer : training_.front()->layers) {
    backend_->finish_projection(layer.attention_out, layer.attention_out_grads);
    backend_->finish_projection(layer.mlp_out, layer.mlp_out_grads);
  }
}

std::vector<MemoryRow> GPT::memory_table() const {
  std::vector<MemoryRow> rows{{"weights", weights_.bytes()}};
  if (grads_.allocated()) rows.push_back({"gradients", grads_.bytes()});
  if (fake_quantized_.allocated()) rows.push_back({"fake-quantised weights", fake_quantized_.bytes()});
  const auto add_plan = [&](const char* name, const Plan& plan) {
    rows.push_back({sentence(name, " arena, ", plan.B, "×", plan.T, " tokens"), plan.memory.bytes()});
    std::vector<MemoryRow> kinds;
    for (const PlannedBuffer& buffer : plan.arena.buffers()) {
      auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const MemoryRow& r) { return r.what == buffer.name; });
      if (kind == kinds.end()) kind = kinds.insert(kinds.end(), {buffer.name, 0});
      kind->bytes += buffer.bytes;
    }
    for (MemoryRow& kind : kinds) rows.push_back({"  of it, at some time: " + kind.what, kind.bytes});
  };
  for (const auto& plan : training_) add_plan("training", *plan);
  for (const auto& plan : inference_) add_plan("inference", *plan);
  return rows;
}

}  // namespace pgolf
