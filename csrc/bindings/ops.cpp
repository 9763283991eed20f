// The operations of backend.h on NumPy arrays, for pgolf.ops, which checks the arrays and makes those for results.
// A call takes the arrays that it reads and those that it writes or adds to, both by name, and numbers as keywords.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <list>
#include <map>
#include <mutex>

#include "bindings/bindings.h"
#include "core/error.h"
#include "core/parallel.h"
#include "model/gpt.h"

namespace py = pybind11;

namespace pgolf {
namespace {

DType dtype_of(const py::dtype& type) {
  const char kind = type.kind();
  const auto size = type.itemsize();
  if (kind == 'f' && size == 4) return DType::f32;
  if (kind == 'f' && size == 8) return DType::f64;
  if (kind == 'i' && size == 4) return DType::i32;
  if (kind == 'u' && size == 1) return DType::u8;
  throw std::invalid_argument(
      sentence("The dtype is ", std::string(py::str(type)), "; expected float32, float64, int32 or uint8."));
}

// The arrays of one call in the backend's memory. Names of one array are names of one tensor.
class Staged {
 public:
  explicit Staged(Backend& backend) : backend_(backend) {}
  Staged(Backend& backend, const py::dict& inputs, const py::dict& outputs) : Staged(backend) {
    for (const auto& [name, array] : inputs)
      names_[py::cast<std::string>(name)] = add(py::cast<py::array>(array), false);
    for (const auto& [name, array] : outputs)
      names_[py::cast<std::string>(name)] = add(py::cast<py::array>(array), true);
  }

  TensorView add(py::array array, bool written) {
    require(array.ndim() <= kMaxRank && (array.flags() & py::array::c_style),
            "An operation takes C-contiguous arrays of at most ", kMaxRank, " axes.");
    TensorView tensor(dtype_of(array.dtype()), {});
    for (py::ssize_t i = 0; i < array.ndim(); ++i) tensor.shape[tensor.rank++] = array.shape(i);
    tensor.rank = std::max(tensor.rank, 1);  // a scalar is [1]
    void* host = written ? array.mutable_data() : const_cast<void*>(array.data());
    for (Copy& known : copies_) {
      if (known.host != host || known.tensor.bytes() != tensor.bytes()) continue;
      known.written |= written;
      tensor.data = known.tensor.data;
      return tensor;
    }
    tensor.data = memory(tensor.bytes());
    copies_.push_back({host, tensor, written});
    return tensor;
  }

  // Scratch. Its bytes are all ones, NaN as numbers: an operation that reads what it has not written cannot hide it.
  TensorView area(std::size_t bytes) {
    const TensorView area(DType::u8, {static_cast<std::int64_t>(bytes)}, memory(bytes));
    const std::vector<unsigned char> ones(bytes, 0xFF);
    if (bytes) backend_.upload(area.data, ones.data(), bytes);
    return area;
  }

  TensorView find(const char* name) const {  // absent: rank 0
    const auto found = names_.find(name);
    return found == names_.end() ? TensorView() : found->second;
  }
  TensorView operator[](const char* name) const {
    const TensorView tensor = find(name);
    require(static_cast<bool>(tensor), "The operation needs an array named ", name, ".");
    return tensor;
  }

  void upload() {
    for (const Copy& c : copies_)
      if (c.tensor.data) backend_.upload(c.tensor.data, c.host, c.tensor.bytes());
  }
  void download() {
    for (const Copy& c : copies_)
      if (c.written && c.tensor.data) backend_.download(c.host, c.tensor.data, c.tensor.bytes());
  }

 private:
  struct Copy {
    void* host;
    TensorView tensor;
    bool written;
  };

  void* memory(std::size_t bytes) {
    memory_.emplace_back().reserve(backend_, bytes);
    return memory_.back().data();
  }

  Backend& backend_;
  std::map<std::string, TensorView> names_;
  std::vector<Copy> copies_;
  std::list<DeviceMemory> memory_;
};

struct Ops {
  explicit Ops(const py::dtype& dtype) : backend(make_cpu_backend(dtype_of(dtype))) {}

  template <class F>
  void run(Staged& arrays, F&& body) {  // body allocates scratch itself: its size is good for this call alone
    py::gil_scoped_release release;
    std::lock_guard lock(mutex);
    NativeCall call;
    arrays.upload();
    body();
    arrays.download();
  }

  StepValues* upload(Staged& arrays, const StepValues& values) {
    void* device = arrays.area(sizeof values).data;
    backend->upload(device, &values, sizeof values);
    return static_cast<StepValues*>(device);
  }

  // Runs the operation itself, for benchmarks: staging and scratch are not in its time.
  template <class F>
  void timed(F&& operation) {
    const auto start = std::chrono::steady_clock::now();
    operation();
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  std::unique_ptr<Backend> backend;
  std::mutex mutex;
  double seconds = 0;  // of the last operation
};

template <class T>
T number(const py::kwargs& numbers, const char* name) {
  return py::cast<T>(numbers[name]);
}

// ---- The operations of the model: which array is which field.

Embed make_embed(const Staged& t, const py::kwargs& n) {
  Embed op;
  op.ids = t["ids"];
  op.tok_emb = t["tok_emb"];
  op.bigram_emb = t.find("bigram_emb");
  op.bigram_proj = t.find("bigram_proj");
  op.bigram_scale = t.find("bigram_scale");
  op.smear_gate = t["smear_gate"];
  op.reset_at_bos = number<bool>(n, "reset_at_bos");
  op.bos_id = number<std::int32_t>(n, "bos_id");
  op.x0 = t["x0"];
  return op;
}
EmbedGrads make_embed_grads(const Staged& t, const py::kwargs&) {
  EmbedGrads grads;
  grads.dx0 = t["dx0"];
  grads.tok_emb = t["dtok_emb"];
  grads.bigram_emb = t.find("dbigram_emb");
  grads.bigram_proj = t.find("dbigram_proj");
  grads.bigram_scale = t.find("dbigram_scale");
  grads.smear_gate = t["dsmear_gate"];
  return grads;
}

MixedInput make_mixed(const Staged& t) {
  MixedInput op;
  op.x = t["x"];
  op.x0 = t["x0"];
  op.resid_mix = t["resid_mix"];
  op.skip = t.find("skip");
  op.skip_weight = t.find("skip_weight");
  return op;
}

Qkv make_qkv(const Staged& t, const py::kwargs&) {
  Qkv op;
  op.in = make_mixed(t);
  op.wq = t["wq"];
  op.wk = t["wk"];
  op.wv = t["wv"];
  op.cos = t["cos"];
  op.sin = t["sin"];
  op.q = t["q"];
  op.k = t["k"];
  op.v = t["v"];
  return op;
}
QkvGrads make_qkv_grads(const Staged& t, const py::kwargs&) {
  QkvGrads grads;
  grads.dq = t["dq"];
  grads.dk = t["dk"];
  grads.dv = t["dv"];
  grads.dx = t["dx"];
  grads.dx0 = t["dx0"];
  grads.dskip = t.find("dskip");
  grads.pending = t.find("pending");
  grads.resid_mix = t["dresid_mix"];
  grads.skip_weight = t.find("dskip_weight");
  grads.wq = t["dwq"];
  grads.wk = t["dwk"];
  grads.wv = t["dwv"];
  return grads;
}

Attention make_attention(const Staged& t, const py::kwargs&) {
  Attention op;
  op.q = t["q"];
  op.k = t["k"];
  op.v = t["v"];
  op.gain = t["gain"];
  op.o = t["o"];
  return op;
}
AttentionGrads make_attention_grads(const Staged& t, const py::kwargs&) {
  AttentionGrads grads;
  grads.d_o = t["do"];
  grads.dq = t["dq"];
  grads.dk = t["dk"];
  grads.dv = t["dv"];
  grads.gain = t["dgain"];
  return grads;
}

ProjectResidual make_project_residual(const Staged& t, const py::kwargs&) {
  ProjectResidual op;
  op.a = t["a"];
  op.w = t["w"];
  op.scale = t["scale"];
  op.out = t["out"];
  if (t.find("resid_mix"))
    op.mixed = make_mixed(t);
  else
    op.x = t["x"];
  return op;
}
ProjectResidualGrads make_project_residual_grads(const Staged& t, const py::kwargs&) {
  ProjectResidualGrads grads;
  grads.dout = t["dout"];
  grads.da = t["da"];
  grads.w = t["dw"];
  return grads;
}
ProjectResidual make_finish_projection(const Staged& t, const py::kwargs&) {
  ProjectResidual op;
  op.w = t["w"];
  op.scale = t["scale"];
  return op;
}
ProjectResidualGrads make_finish_projection_grads(const Staged& t, const py::kwargs&) {
  ProjectResidualGrads grads;
  grads.w = t["dw"];
  grads.scale = t["dscale"];
  return grads;
}

MlpUp make_mlp_up(const Staged& t, const py::kwargs&) {
  MlpUp op;
  op.x = t["x"];
  op.w = t["w"];
  op.h = t["h"];
  return op;
}
MlpUpGrads make_mlp_up_grads(const Staged& t, const py::kwargs&) {
  MlpUpGrads grads;
  grads.dh = t["dh"];
  grads.dx = t["dx"];
  grads.w = t["dw"];
  return grads;
}

Head make_head(const Staged& t, const py::kwargs& n) {
  Head op;
  op.x = t["x"];
  op.w = t["w"];
  op.targets = t.find("targets");
  op.softcap = number<double>(n, "softcap");
  op.first = number<std::int64_t>(n, "first");
  op.logits = t.find("logits");
  op.losses = t.find("losses");
  return op;
}
HeadGrads make_head_grads(const Staged& t, const py::kwargs& n) {
  HeadGrads grads;
  grads.loss_scale = number<double>(n, "loss_scale");
  grads.dx = t["dx"];
  grads.w = t["dw"];
  return grads;
}

template <class Op>
using Make = Op (*)(const Staged&, const py::kwargs&);

// name(inputs, outputs, **numbers) -> saved, uint8
template <class Op>
void def_forward(py::class_<Ops>& c, const char* name, Make<Op> make, void (Backend::*forward)(const Op&)) {
  c.def(name, [make, forward](Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& numbers) {
    Staged arrays(*self.backend, inputs, outputs);
    Op op = make(arrays, numbers);
    const std::size_t bytes = self.backend->bytes(op).saved;
    py::array_t<std::uint8_t> saved(static_cast<py::ssize_t>(bytes));
    std::memset(saved.mutable_data(), 0xFF, bytes);  // as scratch
    op.saved = arrays.add(saved, true);
    self.run(arrays, [&] {
      op.scratch = arrays.area(self.backend->bytes(op).forward_scratch);
      self.timed([&] { ((*self.backend).*forward)(op); });
    });
    return saved;
  });
}

// name(inputs, outputs, **numbers); the inputs hold as "saved" what a forward returned, if one was run.
template <class Op, class Grads>
void def_backward(py::class_<Ops>& c, const char* name, Make<Op> make, Make<Grads> make_grads,
                  void (Backend::*backward)(const Op&, const Grads&)) {
  c.def(name, [=](Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& numbers) {
    Staged arrays(*self.backend, inputs, outputs);
    Op op = make(arrays, numbers);
    Grads grads = make_grads(arrays, numbers);
    op.saved = arrays.find("saved");
    self.run(arrays, [&] {
      const OpBytes bytes = self.backend->bytes(op);
      if (!op.saved) op.saved = arrays.area(bytes.saved);
      grads.scratch = arrays.area(bytes.backward_scratch);
      self.timed([&] { ((*self.backend).*backward)(op, grads); });
    });
  });
}

// ---- The optimizer's.

// A step's values. The other groups' rates are NaN: reading the wrong one shows.
StepValues make_values(const py::kwargs& n) {
  StepValues values{};
  std::fill_n(values.lr, int{kGroups}, std::numeric_limits<double>::quiet_NaN());
  std::fill_n(values.weight_decay, int{kGroups}, std::numeric_limits<double>::quiet_NaN());
  const int group = number<int>(n, "group");
  require(group >= 0 && group < kGroups, "group is ", group, "; expected 0 to ", kGroups - 1, ".");
  values.lr[group] = number<double>(n, "lr");
  values.weight_decay[group] = number<double>(n, "weight_decay");
  values.grad_scale = number<double>(n, "grad_scale");
  values.finite = number<bool>(n, "finite");
  return values;
}

using Arrays = std::vector<py::array>;

std::vector<TensorView> add_all(Staged& arrays, const Arrays& list, bool written) {
  std::vector<TensorView> views;
  for (const py::array& array : list) views.push_back(arrays.add(array, written));
  return views;
}

py::tuple grad_norm(Ops& self, const Arrays& grads, const py::kwargs& n) {
  Staged arrays(*self.backend);
  const std::vector<TensorView> views = add_all(arrays, grads, false);
  StepValues values{};
  values.clip = number<double>(n, "clip");
  self.run(arrays, [&] {
    StepValues* const device = self.upload(arrays, values);
    self.timed([&] { self.backend->grad_norm(views, device); });
    self.backend->download(&values, device, sizeof values);
  });
  return py::make_tuple(values.grad_norm, values.grad_scale, values.finite != 0);
}

void adam(Ops& self, const Arrays& w, const Arrays& grads, const Arrays& m, const Arrays& v, const py::kwargs& n) {
  Staged arrays(*self.backend);
  const auto ws = add_all(arrays, w, true), gs = add_all(arrays, grads, false);
  const auto ms = add_all(arrays, m, true), vs = add_all(arrays, v, true);
  const auto group = static_cast<Group>(number<int>(n, "group"));
  std::vector<AdamTensor> tensors;
  for (std::size_t i = 0; i < ws.size(); ++i) tensors.push_back({ws[i], gs.at(i), ms.at(i), vs.at(i), group});
  StepValues values = make_values(n);
  values.beta1 = number<double>(n, "beta1");
  values.beta2 = number<double>(n, "beta2");
  values.eps = number<double>(n, "eps");
  values.bias1 = number<double>(n, "bias1");
  values.bias2 = number<double>(n, "bias2");
  self.run(arrays, [&] {
    const StepValues* const device = self.upload(arrays, values);
    self.timed([&] { self.backend->adam(tensors, device); });
  });
}

void muon(Ops& self, const Arrays& w, const Arrays& grads, const Arrays& momenta, int ns_steps, const py::kwargs& n) {
  Staged arrays(*self.backend);
  const auto ws = add_all(arrays, w, true), gs = add_all(arrays, grads, false), ms = add_all(arrays, momenta, true);
  std::vector<MuonTensor> tensors;
  for (std::size_t i = 0; i < ws.size(); ++i) tensors.push_back({ws[i], gs.at(i), ms.at(i)});
  StepValues values = make_values(n);
  values.momentum = number<double>(n, "momentum");
  self.run(arrays, [&] {
    const TensorView scratch = arrays.area(self.backend->muon_scratch(tensors));
    const StepValues* const device = self.upload(arrays, values);
    self.timed([&] { self.backend->muon(tensors, ns_steps, device, scratch.data); });
  });
}

void fake_quantize(Ops& self, const py::array& w, const py::array& out, int clip) {
  Staged arrays(*self.backend);
  const TensorView from = arrays.add(w, false), to = arrays.add(out, true);
  self.run(arrays, [&] { self.backend->fake_quantize(from, to, clip); });
}

double sum(Ops& self, const py::array& x) {
  Staged arrays(*self.backend);
  const TensorView view = arrays.add(x, false);
  double total = 0;
  self.run(arrays, [&] { total = self.backend->sum(view); });
  return total;
}

void axpby(Ops& self, double a, const py::array& x, double b, const py::array& y) {
  Staged arrays(*self.backend);
  const TensorView from = arrays.add(x, false), to = arrays.add(y, true);
  self.run(arrays, [&] { self.backend->axpby(a, from, b, to); });
}

// The pool itself, for tests: function(i) for i in range(count), each on some thread of it.
void run_python_tasks(std::int64_t count, const py::function& function) {
  py::gil_scoped_release release;
  parallel_for(count, [&](std::int64_t i) {
    py::gil_scoped_acquire acquire;
    function(i);
  });
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<Ops> c(m, "Ops");
  c.def(py::init<const py::dtype&>(), py::arg("dtype"));
  c.def_readonly("seconds", &Ops::seconds);
  c.def("description", [](const Ops& self) { return self.backend->description(); });
  def_forward(c, "embed", make_embed, &Backend::embed_forward);
  def_backward(c, "embed_backward", make_embed, make_embed_grads, &Backend::embed_backward);
  def_forward(c, "qkv", make_qkv, &Backend::qkv_forward);
  def_backward(c, "qkv_backward", make_qkv, make_qkv_grads, &Backend::qkv_backward);
  def_forward(c, "attention", make_attention, &Backend::attention_forward);
  def_backward(c, "attention_backward", make_attention, make_attention_grads, &Backend::attention_backward);
  def_forward(c, "project_residual", make_project_residual, &Backend::project_residual_forward);
  def_backward(c, "project_residual_backward", make_project_residual, make_project_residual_grads,
               &Backend::project_residual_backward);
  def_backward(c, "finish_projection", make_finish_projection, make_finish_projection_grads,
               &Backend::finish_projection);
  def_forward(c, "mlp_up", make_mlp_up, &Backend::mlp_up_forward);
  def_backward(c, "mlp_up_backward", make_mlp_up, make_mlp_up_grads, &Backend::mlp_up_backward);
  def_forward(c, "head_logits", make_head, &Backend::head_logits);
  def_forward(c, "head_loss", make_head, &Backend::head_loss);
  def_backward(c, "head_loss_backward", make_head, make_head_grads, &Backend::head_loss_backward);
  c.def("grad_norm", &grad_norm);
  c.def("adam", &adam);
  c.def("muon", &muon);
  c.def("fake_quantize", &fake_quantize);
  c.def("sum", &sum);
  c.def("axpby", &axpby);
  m.def("run_tasks", &run_python_tasks, py::arg("count"), py::arg("function"));
}

}  // namespace pgolf
