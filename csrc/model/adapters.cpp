#include "model/adapters.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "core/error.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"
#include "model/plan.h"

namespace pgolf {

namespace {

// float16's smallest number is 6e−8: the gradients of a mean over hundreds of targets need room above it.
double loss_scale(const Backend& backend) { return backend.precision() == DType::f16 ? 0x1p8 : 1.0; }

}  // namespace

DocumentAdapters::DocumentAdapters(std::shared_ptr<GPT> model, const AdapterSettings& settings)
    : model_(std::move(model)), settings_(settings) {
  NativeCall call;
  Backend& backend = model_->backend();
  const DType master = backend.master_dtype();
  const std::int64_t B = settings_.rows;
  require(B >= 1 && settings_.rank >= 1, "The adapters are of rank ", settings_.rank, " for ", B,
          " documents; both must be at least 1.");
  require(!settings_.windows.empty(), "Adapters need the shape of at least one window.");
  std::int64_t longest = 0, most = 0;
  for (const auto& [length, first] : settings_.windows) {
    require(first >= 0 && first < length, "The first scored position is ", first, "; it must lie in 0 … ", length - 1,
            ".");
    longest = std::max(longest, length);
    most = std::max(most, length - first);
  }
  const std::size_t scores = static_cast<std::size_t>(B * most) * size_of(master);
  require(scores <= Backend::kReadBytes, "The scores of ", B, " windows of ", most, " targets take ", scores,
          " bytes; at most ", Backend::kReadBytes, " are read at once: take fewer documents or shorter chunks.");

  require(model_->looping() || model_->config().num_loops == 0,
          "Adapters belong to the places of a model that runs with its loops; this one's are off.");
  make_adapters();
  const std::size_t numbers = align_up(static_cast<std::size_t>(B) * sizeof(std::int32_t));
  control_.reserve(backend, 2 * numbers + scores);
  documents_ = TensorView(DType::i32, {B}, control_.data());
  steps_ = TensorView(DType::i32, {B}, control_.data() + numbers);
  weights_ = TensorView(master, {B, most}, control_.data() + 2 * numbers);
  row_weights_.resize(static_cast<std::size_t>(weights_.size()));
  narrow_weights_.resize(row_weights_.size());

  cos_ = sin_ = TensorView(master, {longest, model_->config().head_dim() / 2});
  rope_.reserve(backend, 2 * align_up(cos_.bytes()));
  cos_.data = rope_.data();
  sin_.data = rope_.data() + align_up(cos_.bytes());
  upload_rope_tables(model_->config(), backend, cos_, sin_);
  make_plans();
}

DocumentAdapters::~DocumentAdapters() = default;

// One after another: what Adam changes, its gradient and moments, and what operations read in its place.
void DocumentAdapters::make_adapters() {
  Backend& backend = model_->backend();
  const std::int64_t r = settings_.rank;
  const auto place = [&](char* base) {
    std::size_t used = 0;
    const auto take = [&](DType dtype, std::int64_t size) {
      const TensorView view(dtype, {settings_.rows, size}, base ? base + used : nullptr);
      used += align_up(view.bytes());
      return view;
    };
    adapters_.clear();
    for (const AdapterSpec& spec : adapter_table(model_->config())) {
      const std::int64_t size = r * spec.numbers();
      AdapterRows rows{};
      for (TensorView* t : {&rows.w, &rows.grad, &rows.m, &rows.v}) *t = take(backend.master_dtype(), size);
      if (backend.rounds()) rows.copy = take(backend.dtype(), size);
      rows.products = static_cast<int>(spec.names.size());
      rows.a_size = r * spec.in;
      rows.bound = 1.0 / std::sqrt(static_cast<double>(spec.in));
      for (std::size_t p = 0; p < spec.names.size(); ++p) rows.streams[p] = crc32(spec.names[p]);
      adapters_.push_back(rows);
    }
    return used;
  };
  numbers_.reserve(backend, place(nullptr));
  place(numbers_.data());
  backend.zero(TensorView(DType::u8, {static_cast<std::int64_t>(numbers_.bytes())}, numbers_.data()));
}

// A plan for each shape. They run one at a time, in one arena.
void DocumentAdapters::make_plans() {
  Backend& backend = model_->backend();
  plans_.clear();
  std::size_t bytes = 0;
  for (const auto& [length, first] : settings_.windows) {
    auto plan = std::make_unique<Plan>(model_->passes(), Mode::adapt, settings_.rows, length, first);
    plan->recorder = &backend;
    plan->cos = cos_;
    plan->sin = sin_;
    model_->bind(*plan, false);
    bind(*plan);
    plan->lay_out(model_->config(), backend, false);
    bytes = std::max(bytes, plan->arena_bytes);
    plans_.push_back(std::move(plan));
  }
  if (!separate_buffers()) arena_.reserve(backend, bytes);
  for (auto& plan : plans_) {
    plan->base = arena_.data();
    plan->lay_out(model_->config(), backend, true);
  }
}

void DocumentAdapters::bind(Plan& plan) const {
  const auto read = [](const AdapterRows& rows) { return rows.copy ? rows.copy : rows.w; };
  for (std::size_t place = 0; place < plan.blocks.size(); ++place) {
    Plan::Block& block = plan.blocks[place];
    const AdapterRows& rows = adapters_[place];
    block.attention.adapters = read(rows);
    block.attention.rank = settings_.rank;
    block.attention_grads.adapters = rows.grad;
  }
  plan.head.adapters = read(adapters_.back());
  plan.head.rank = settings_.rank;
  plan.head_grads.adapters = adapters_.back().grad;
  plan.head_grads.weights = TensorView(weights_.dtype, {plan.B, plan.T - plan.first}, weights_.data);
  plan.head_grads.loss_scale = loss_scale(model_->backend());
}

Plan& DocumentAdapters::plan_of(const WindowShape& shape) {
  if (plans_.front()->concurrency != model_->backend().concurrency()) make_plans();
  for (auto& plan : plans_)
    if (plan->T == shape.length && plan->first == shape.first) return *plan;
  throw std::invalid_argument(
      sentence("No window of ", shape.length, " tokens that scores from position ", shape.first, " on was planned."));
}

void DocumentAdapters::begin(const std::int32_t* documents) {
  NativeCall call;
  Backend& backend = model_->backend();
  backend.upload(documents_.data, documents, documents_.bytes());
  backend.adapters_begin(adapters_, documents_, settings_.seed);
}

int DocumentAdapters::window(const std::int32_t* ids, const std::int32_t* targets, const std::int32_t* scored,
                             const std::int32_t* steps, const WindowShape& shape) {
  NativeCall call;
  Backend& backend = model_->backend();
  Plan& plan = plan_of(shape);
  const std::int64_t B = settings_.rows, T = shape.length, first = shape.first, width = T - first;
  model_->check_ids("ids", ids, B, T);
  model_->check_ids("targets", targets, B, T);
  model_->ensure_copies(false);

  std::fill(row_weights_.begin(), row_weights_.end(), 0.0);
  bool trains = false;
  for (std::int64_t b = 0; b < B; ++b) {
    if (steps[b] < 1) continue;
    const std::int64_t begin = scored[2 * b], end = scored[2 * b + 1];
    require(first <= begin && begin < end && end <= T, "Row ", b, " trains on positions ", begin, " to ", end - 1,
            "; the window's scores are of positions ", first, " to ", T - 1, ".");
    trains = true;
    const auto row = row_weights_.begin() + b * width;
    std::fill(row + (begin - first), row + (end - first), 1.0 / static_cast<double>(end - begin));
  }
  backend.upload(plan.ids.data, ids, plan.ids.bytes());
  backend.upload(plan.targets.data, targets, plan.targets.bytes());
  backend.upload(steps_.data, steps, steps_.bytes());
  const TensorView& weights = plan.head_grads.weights;
  if (weights.dtype == DType::f64) {
    backend.upload(weights.data, row_weights_.data(), weights.bytes());
  } else {
    std::transform(row_weights_.begin(), row_weights_.end(), narrow_weights_.begin(),
                   [](double w) { return static_cast<float>(w); });
    backend.upload(weights.data, narrow_weights_.data(), weights.bytes());
  }

  const AdapterAdam adam{settings_.lr, settings_.beta1, settings_.beta2, settings_.eps, 1.0 / loss_scale(backend)};
  const auto work = [&] {
    plan.forward(backend);
    backend.head_loss_backward(plan.head, plan.head_grads);  // here the scores are written, before anything is trained
    if (!trains) return;
    plan.backward(backend);
    backend.adapters_step(adapters_, steps_, adam);
  };
  int& recording = plan.recording[trains];
  recording = backend.capture(recording, std::cref(work));
  return backend.read_later(plan.head.losses.data, plan.head.losses.bytes());
}

}  // namespace pgolf
