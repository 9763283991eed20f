// The operations of backend.h and the pieces of pieces.h on NumPy arrays, for pgolf.ops, which checks the arrays and
// makes those for results. A call takes the arrays that it reads and those that it writes or adds to, both by name, and
// numbers as keywords.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <list>
#include <map>
#include <mutex>

#include "bindings/bindings.h"
#include "bindings/model.h"
#include "core/arena.h"
#include "core/error.h"
#include "core/half.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"
#include "model/product_rate.h"
#include "pieces.h"

namespace py = pybind11;

namespace pgolf {
namespace {

// Numbers of an S tensor on their way to a backend whose S is a 16-bit dtype, or that rounds floats to one; and back.
class Storage {
 public:
  explicit Storage(const Backend& backend) : in_(backend.dtype()), precision_(backend.precision()) {}
  bool converts() const { return precision_ == DType::bf16 || precision_ == DType::f16; }

  std::vector<unsigned char> pack(const float* values, std::int64_t count) const {
    std::vector<unsigned char> packed(static_cast<std::size_t>(count) * size_of(in_));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint16_t bits = precision_ == DType::bf16 ? bf16_bits(values[i]) : half_bits(values[i]);
      if (in_ == DType::f32)
        reinterpret_cast<float*>(packed.data())[i] = value(bits);
      else
        reinterpret_cast<std::uint16_t*>(packed.data())[i] = bits;
    }
    return packed;
  }
  void unpack(const unsigned char* packed, std::int64_t count, float* values) const {
    for (std::int64_t i = 0; i < count; ++i)
      values[i] = in_ == DType::f32 ? reinterpret_cast<const float*>(packed)[i]
                                    : value(reinterpret_cast<const std::uint16_t*>(packed)[i]);
  }

 private:
  float value(std::uint16_t bits) const {
    return precision_ == DType::bf16 ? std::bit_cast<float>(std::uint32_t{bits} << 16) : float_from_half(bits);
  }

  DType in_, precision_;
};

// The arrays of one call in the backend's memory. A float array becomes an S tensor under `["name"]`, an M tensor under
// `master("name")`; one array under several names is one tensor.
class Staged {
 public:
  explicit Staged(Backend& backend) : backend_(backend), storage_(backend) {}
  Staged(Backend& backend, const py::dict& inputs, const py::dict& outputs) : Staged(backend) {
    for (const auto& [name, array] : inputs) arrays_[py::cast<std::string>(name)] = {py::cast<py::array>(array), false};
    for (const auto& [name, array] : outputs) arrays_[py::cast<std::string>(name)] = {py::cast<py::array>(array), true};
  }

  TensorView add(py::array array, bool written, bool master = true) {
    require(array.ndim() <= kMaxRank && (array.flags() & py::array::c_style),
            "An operation takes C-contiguous arrays of at most ", kMaxRank, " axes.");
    const char kind = array.dtype().kind();
    const bool number = kind == 'f', wide = backend_.master_dtype() == DType::f64;
    require(number ? array.itemsize() == (wide ? 8 : 4)
                   : (kind == 'i' && array.itemsize() == 4) || (kind == 'u' && array.itemsize() <= 2) ||
                         (kind == 'i' && array.itemsize() == 1),
            "The dtype is ", std::string(py::str(array.dtype())), "; expected ", wide ? "float64" : "float32",
            " or int32.");
    const bool packed = number && !master && storage_.converts();
    TensorView tensor(number                  ? (packed ? backend_.dtype() : backend_.master_dtype())
                      : array.itemsize() == 4 ? DType::i32
                      : array.itemsize() == 2 ? DType::f16
                                              : DType::u8,
                      {});
    for (py::ssize_t i = 0; i < array.ndim(); ++i) tensor.shape[tensor.rank++] = array.shape(i);
    tensor.rank = std::max(tensor.rank, 1);  // a scalar is [1]
    void* host = written ? array.mutable_data() : const_cast<void*>(array.data());
    for (Copy& known : copies_) {
      if (known.host != host || known.tensor.size() != tensor.size() || known.packed != packed) continue;
      known.written |= written;
      tensor.data = known.tensor.data;
      return tensor;
    }
    tensor.data = memory(tensor.bytes());
    copies_.push_back({host, tensor, written, packed});
    return tensor;
  }

  // Scratch. Its bytes are all ones, NaN as numbers: an operation that reads what it has not written cannot hide it.
  TensorView area(std::size_t bytes) {
    const TensorView area(DType::u8, {static_cast<std::int64_t>(bytes)}, memory(bytes));
    const std::vector<unsigned char> ones(bytes, 0xFF);
    if (bytes) backend_.upload(area.data, ones.data(), bytes);
    return area;
  }

  bool has(const char* name) const { return arrays_.contains(name); }
  TensorView find(const char* name, bool master = false) {  // absent: rank 0
    const auto found = arrays_.find(name);
    return found == arrays_.end() ? TensorView() : add(found->second.first, found->second.second, master);
  }
  TensorView operator[](const char* name) { return need(name, false); }
  TensorView master(const char* name) { return need(name, true); }

  void upload() {
    for (const Copy& c : copies_) {
      if (!c.tensor.data) continue;
      if (c.packed) {
        const auto packed = storage_.pack(static_cast<const float*>(c.host), c.tensor.size());
        backend_.upload(c.tensor.data, packed.data(), packed.size());
      } else {
        backend_.upload(c.tensor.data, c.host, c.tensor.bytes());
      }
    }
  }
  void download() {
    for (const Copy& c : copies_) {
      if (!c.written || !c.tensor.data) continue;
      if (c.packed) {
        std::vector<unsigned char> packed(c.tensor.bytes());
        backend_.download(packed.data(), c.tensor.data, packed.size());
        storage_.unpack(packed.data(), c.tensor.size(), static_cast<float*>(c.host));
      } else {
        backend_.download(c.host, c.tensor.data, c.tensor.bytes());
      }
    }
  }

 private:
  struct Copy {
    void* host;
    TensorView tensor;
    bool written, packed;
  };

  TensorView need(const char* name, bool master) {
    const TensorView tensor = find(name, master);
    require(static_cast<bool>(tensor), "The operation needs an array named ", name, ".");
    return tensor;
  }
  void* memory(std::size_t bytes) {
    memory_.emplace_back().reserve(backend_, bytes);
    return memory_.back().data();
  }

  Backend& backend_;
  Storage storage_;
  std::map<std::string, std::pair<py::array, bool>> arrays_;  // and whether it is written
  std::vector<Copy> copies_;
  std::list<DeviceMemory> memory_;
};

struct Ops {
  Ops(int device, const std::string& dtype) : backend(make_backend(device, dtype)) {}

  template <class F>
  void run(Staged& arrays, F&& body) {  // body allocates scratch itself: its size is good for this call alone
    py::gil_scoped_release release;
    std::lock_guard lock(mutex);
    NativeCall call;
    arrays.upload();
    body();
    arrays.download();
  }

  template <class Face>  // Backend or Pieces
  Face& face() {
    if constexpr (std::is_same_v<Face, Pieces>)
      return backend->pieces();
    else
      return *backend;
  }

  StepValues* upload(Staged& arrays, const StepValues& values) {
    void* device = arrays.area(sizeof values).data;
    backend->upload(device, &values, sizeof values);
    return static_cast<StepValues*>(device);
  }

  // Runs the operation itself, for benchmarks: staging and scratch are not in its time.
  template <class F>
  void timed(F&& operation) {
    const auto run = [&](int times) {
      backend->synchronize();
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < times; ++i) operation();
      backend->synchronize();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / times;
    };
    seconds = run(1);
    if (repeats > 0) seconds = run(repeats);
  }

  std::unique_ptr<Backend> backend;
  std::mutex mutex;
  int repeats = 0;     // of every operation, after it has run: what it returns then is good for nothing but its time
  double seconds = 0;  // of the last operation, or the mean of its repeats
};

template <class T>
T number(const py::kwargs& numbers, const char* name) {
  return py::cast<T>(numbers[name]);
}

// ---- Embedding, pieces and head: which array is which field.

Embed make_embed(Staged& t, const py::kwargs& n) {
  Embed op;
  op.ids = t["ids"];
  op.tok_emb = t["tok_emb"];
  op.bigram_emb = t.find("bigram_emb");
  op.bigram_proj = t.find("bigram_proj");
  op.bigram_scale = t.find("bigram_scale", true);
  op.smear_gate = t.master("smear_gate");
  op.reset_at_bos = number<bool>(n, "reset_at_bos");
  op.bos_id = number<std::int32_t>(n, "bos_id");
  op.x0 = t["x0"];
  return op;
}
EmbedGrads make_embed_grads(Staged& t, const py::kwargs&) {
  EmbedGrads grads;
  grads.dx0 = t["dx0"];
  grads.tok_emb = t.master("dtok_emb");
  grads.bigram_emb = t.find("dbigram_emb", true);
  grads.bigram_proj = t.find("dbigram_proj", true);
  grads.bigram_scale = t.find("dbigram_scale", true);
  grads.smear_gate = t.master("dsmear_gate");
  return grads;
}

MixedInput make_mixed(Staged& t) {
  MixedInput op;
  op.x = t["x"];
  op.x0 = t["x0"];
  op.resid_mix = t.master("resid_mix");
  op.skip = t.find("skip");
  op.skip_weight = t.find("skip_weight", true);
  return op;
}

Qkv make_qkv(Staged& t, const py::kwargs& n) {
  Qkv op;
  op.norm_scale = number<double>(n, "norm_scale");
  op.rope_dims = number<std::int64_t>(n, "rope_dims");
  op.in = make_mixed(t);
  op.wq = t["wq"];
  op.wk = t["wk"];
  op.wv = t["wv"];
  op.cos = t.master("cos");
  op.sin = t.master("sin");
  op.q = t["q"];
  op.k = t["k"];
  op.v = t["v"];
  op.adapters = t.find("adapters");
  if (op.adapters) op.rank = op.adapters.shape[1] / (2 * op.wq.shape[1] + op.wq.shape[0] + op.wv.shape[0]);
  return op;
}
QkvGrads make_qkv_grads(Staged& t, const py::kwargs&) {
  QkvGrads grads;
  grads.dqkv = t["dqkv"];
  grads.dx = t.find("dx");
  grads.dx0 = t.find("dx0", true);
  grads.dskip = t.find("dskip");
  grads.pending = t.find("pending");
  grads.resid_mix = t.find("dresid_mix", true);
  grads.skip_weight = t.find("dskip_weight", true);
  grads.wq = t.find("dwq", true);
  grads.wk = t.find("dwk", true);
  grads.wv = t.find("dwv", true);
  grads.adapters = t.find("dadapters", true);
  return grads;
}

Attention make_attention(Staged& t, const py::kwargs& n) {
  Attention op;
  op.normed = number<bool>(n, "normed");
  op.q = t["q"];
  op.k = t["k"];
  op.v = t["v"];
  op.gain = t.master("gain");
  op.o = t["o"];
  return op;
}
AttentionGrads make_attention_grads(Staged& t, const py::kwargs& n) {
  AttentionGrads grads;
  grads.d_o = t["do"];
  grads.dqkv = t["dqkv"];
  if (t.has("qkv_saved"))
    grads.norms = {t.master("cos"), t.master("sin"), t["qkv_saved"], number<std::int64_t>(n, "rope_dims")};
  grads.gain = t.find("dgain", true);
  return grads;
}

ProjectResidual make_project_residual(Staged& t, const py::kwargs&) {
  ProjectResidual op;
  op.a = t["a"];
  op.w = t["w"];
  op.out = t["out"];
  if (t.has("resid_mix"))
    op.mixed = make_mixed(t);
  else
    op.x = t["x"];
  return op;
}
SquaredRelu make_activation(Staged& t, const py::kwargs& n) {
  return {number<double>(n, "h_scale"), number<double>(n, "negative_slope"), t.find("negative")};
}
ProjectResidualGrads make_project_residual_grads(Staged& t, const py::kwargs& n) {
  ProjectResidualGrads grads;
  grads.activation = make_activation(t, n);
  grads.dout = t["dout"];
  grads.da = t["da"];
  grads.w = t.find("dw", true);
  return grads;
}
MlpUp make_mlp_up(Staged& t, const py::kwargs& n) {
  MlpUp op;
  op.norm_scale = number<double>(n, "norm_scale");
  op.activation = make_activation(t, n);
  op.x = t["x"];
  op.w = t["w"];
  op.h = t["h"];
  return op;
}
MlpUpGrads make_mlp_up_grads(Staged& t, const py::kwargs&) {
  MlpUpGrads grads;
  grads.du = t["du"];
  grads.dx = t["dx"];
  grads.w = t.find("dw", true);
  return grads;
}

Head make_head(Staged& t, const py::kwargs& n) {
  Head op;
  op.x = t["x"];
  op.w = t["w"];
  op.targets = t.find("targets");
  op.softcap = number<double>(n, "softcap");
  op.first = number<std::int64_t>(n, "first");
  op.logits = t.find("logits", true);
  op.losses = t.find("losses", true);
  op.adapters = t.find("adapters");
  if (op.adapters) op.rank = op.adapters.shape[1] / (op.w.shape[0] + op.w.shape[1]);
  return op;
}
HeadGrads make_head_grads(Staged& t, const py::kwargs& n) {
  HeadGrads grads;
  grads.loss_scale = number<double>(n, "loss_scale");
  grads.weights = t.find("weights", true);
  grads.dx = t["dx"];
  grads.w = t.find("dw", true);
  grads.adapters = t.find("dadapters", true);
  return grads;
}

// ---- Whole sublayers.

AttentionSublayer make_attention_sublayer(Staged& t, const py::kwargs& n) {
  AttentionSublayer op;
  const MixedInput in = make_mixed(t);
  op.x.x = in.x;
  op.x0.x = in.x0;
  op.skip.x = in.skip;
  op.resid_mix = in.resid_mix;
  op.skip_weight = in.skip_weight;
  op.norm_scale = number<double>(n, "norm_scale");
  op.rope_dims = number<std::int64_t>(n, "rope_dims");
  op.wq = t["wq"];
  op.wk = t["wk"];
  op.wv = t["wv"];
  op.gain = t.master("gain");
  op.wo = t["wo"];
  op.cos = t.master("cos");
  op.sin = t.master("sin");
  op.position = number<std::int64_t>(n, "position");
  op.k = t.find("k");
  op.v = t.find("v");
  op.adapters = t.find("adapters");
  if (op.adapters) op.rank = op.adapters.shape[1] / (2 * op.wq.shape[1] + op.wq.shape[0] + op.wv.shape[0]);
  op.out.x = t["out"];
  return op;
}
AttentionSublayerGrads make_attention_sublayer_grads(Staged& t, const py::kwargs& n) {
  AttentionSublayerGrads grads;
  grads.dx = t["dx"];
  grads.inputs = number<bool>(n, "inputs");
  grads.dx0 = t.find("dx0", true);
  grads.dskip = t.find("dskip");
  grads.pending = t.find("pending");
  grads.resid_mix = t.find("dresid_mix", true);
  grads.skip_weight = t.find("dskip_weight", true);
  grads.wq = t.find("dwq", true);
  grads.wk = t.find("dwk", true);
  grads.wv = t.find("dwv", true);
  grads.gain = t.find("dgain", true);
  grads.wo = t.find("dwo", true);
  grads.adapters = t.find("dadapters", true);
  return grads;
}
MlpSublayer make_mlp_sublayer(Staged& t, const py::kwargs& n) {
  MlpSublayer op;
  op.norm_scale = number<double>(n, "norm_scale");
  op.negative_slope = number<double>(n, "negative_slope");
  op.x.x = t["x"];
  op.up = t["up"];
  op.down = t["down"];
  op.out.x = t["out"];
  return op;
}
MlpSublayerGrads make_mlp_sublayer_grads(Staged& t, const py::kwargs&) {
  MlpSublayerGrads grads;
  grads.dx = t["dx"];
  grads.up = t.find("dup", true);
  grads.down = t.find("ddown", true);
  return grads;
}

// The buffers of a sublayer's forward or backward in an arena of their own: what is read past its lifetime has been
// overwritten, and what is read before it was written is NaN.
class Buffers {
 public:
  Buffers(Staged& arrays, const SublayerMemory& memory, bool backward, void** pointers) : memory_(memory) {
    const int begin = backward ? memory.steps : 0, end = begin + memory.steps - 1;
    ArenaPlan arena;
    std::vector<int> placed;
    for (int i = 0; i < memory.count; ++i) {
      const SublayerMemory::Buffer& buffer = memory.buffers[i];
      if (buffer.bytes == 0 || buffer.last < begin || buffer.first > end) continue;
      arena.add(buffer.name, buffer.bytes, std::max(buffer.first, begin), std::min(buffer.last, end));
      placed.push_back(i);
    }
    char* const base = arrays.area(arena.solve()).as<char>();
    for (std::size_t n = 0; n < placed.size(); ++n) pointers[placed[n]] = base + arena.offset(static_cast<int>(n));
    pointers_ = pointers;
  }
  // What outlives the forward is kept one after another.
  static std::size_t kept(const SublayerMemory& memory) {
    std::size_t bytes = 0;
    for (int i = 0; i < memory.count; ++i) bytes += kept_of(memory, i);
    return bytes;
  }
  void copy(Backend& backend, const TensorView& kept, bool there) const {
    char* next = kept.as<char>();
    for (int i = 0; i < memory_.count; ++i) {
      const std::size_t bytes = kept_of(memory_, i);
      if (bytes == 0) continue;
      const TensorView own(DType::u8, {static_cast<std::int64_t>(bytes)}, pointers_[i]);
      const TensorView other(DType::u8, {static_cast<std::int64_t>(bytes)}, next);
      backend.copy(there ? other : own, there ? own : other);
      next += bytes;
    }
  }

 private:
  static std::size_t kept_of(const SublayerMemory& memory, int i) {
    const SublayerMemory::Buffer& buffer = memory.buffers[i];
    return buffer.first < memory.steps && buffer.last >= memory.steps ? align_up(buffer.bytes) : 0;
  }

  const SublayerMemory& memory_;
  void** pointers_;
};

template <class Op>
using Make = Op (*)(Staged&, const py::kwargs&);
template <class Op>
using AskMemory = SublayerMemory (Backend::*)(const Op&, bool backward) const;

// name(inputs, outputs, backward=…, **numbers) -> what outlives the forward, uint8
template <class Op>
void def_sublayer_forward(py::class_<Ops>& c, const char* name, Make<Op> make, AskMemory<Op> memory,
                          void (Backend::*forward)(const Op&)) {
  c.def(name, [=](Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& numbers) {
    Staged arrays(*self.backend, inputs, outputs);
    Op op = make(arrays, numbers);
    const bool backward = number<bool>(numbers, "backward");
    const SublayerMemory asked = ((*self.backend).*memory)(op, backward);
    py::array_t<std::uint8_t> kept(static_cast<py::ssize_t>(Buffers::kept(asked)));
    std::memset(kept.mutable_data(), 0xFF, static_cast<std::size_t>(kept.nbytes()));  // as scratch
    const TensorView saved = arrays.add(kept, true);
    self.run(arrays, [&] {
      const SublayerMemory now = ((*self.backend).*memory)(op, backward);
      const Buffers buffers(arrays, now, false, op.memory);
      self.timed([&] { ((*self.backend).*forward)(op); });
      buffers.copy(*self.backend, saved, true);
    });
    return kept;
  });
}

// name(inputs, outputs, **numbers); the inputs hold as "saved" what the forward returned.
template <class Op, class Grads>
void def_sublayer_backward(py::class_<Ops>& c, const char* name, Make<Op> make, Make<Grads> make_grads,
                           AskMemory<Op> memory, void (Backend::*backward)(const Op&, const Grads&)) {
  c.def(name, [=](Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& numbers) {
    Staged arrays(*self.backend, inputs, outputs);
    Op op = make(arrays, numbers);
    const Grads grads = make_grads(arrays, numbers);
    const TensorView saved = arrays["saved"];
    self.run(arrays, [&] {
      const SublayerMemory now = ((*self.backend).*memory)(op, true);
      const Buffers buffers(arrays, now, true, op.memory);
      buffers.copy(*self.backend, saved, false);
      self.timed([&] { ((*self.backend).*backward)(op, grads); });
    });
  });
}

// ---- How they are called.

template <class Face, class Op>
using AskBytes = OpBytes (Face::*)(const Op&) const;

// name(inputs, outputs, **numbers) -> saved, uint8
template <class Face, class Op>
void def_forward(py::class_<Ops>& c, const char* name, Make<Op> make, AskBytes<Face, Op> ask,
                 void (Face::*forward)(const Op&)) {
  c.def(name, [=](Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& numbers) {
    Staged arrays(*self.backend, inputs, outputs);
    Face& face = self.face<Face>();
    Op op = make(arrays, numbers);
    const std::size_t bytes = (face.*ask)(op).saved;
    py::array_t<std::uint8_t> saved(static_cast<py::ssize_t>(bytes));
    std::memset(saved.mutable_data(), 0xFF, bytes);  // as scratch
    op.saved = arrays.add(saved, true);
    self.run(arrays, [&] {
      op.scratch = arrays.area((face.*ask)(op).forward_scratch);
      self.timed([&] { (face.*forward)(op); });
    });
    return saved;
  });
}

// name(inputs, outputs, **numbers); the inputs hold as "saved" what a forward returned, if one was run.
template <class Face, class Op, class Grads, class F>
void def_backward(py::class_<Ops>& c, const char* name, Make<Op> make, Make<Grads> make_grads, AskBytes<Face, Op> ask,
                  F backward) {
  c.def(name, [=](Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& numbers) {
    Staged arrays(*self.backend, inputs, outputs);
    Face& face = self.face<Face>();
    Op op = make(arrays, numbers);
    Grads grads = make_grads(arrays, numbers);
    op.saved = arrays.find("saved");
    self.run(arrays, [&] {
      const OpBytes bytes = (face.*ask)(op);
      if (!op.saved) op.saved = arrays.area(bytes.saved);
      grads.scratch = arrays.area(bytes.backward_scratch);
      self.timed([&] { std::invoke(backward, face, op, grads); });
    });
  });
}

// The whole way back from q, k and v: dqkv, an input, ends as the gradients at their products.
void heads_backward(Pieces& pieces, const Qkv& op, const QkvGrads& grads) {
  pieces.heads_backward(op, grads.dqkv);
  pieces.qkv_backward(op, grads);
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
  values.loss_scale = 1;
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

void muon(Ops& self, const Arrays& w, const Arrays& grads, const Arrays& momenta, int steps,
          const Polynomials& polynomials, const py::kwargs& n) {
  const MuonRule rule{newton_schulz_steps(steps, polynomials), number<bool>(n, "normalize_rows")};
  Staged arrays(*self.backend);
  const auto ws = add_all(arrays, w, true), gs = add_all(arrays, grads, false), ms = add_all(arrays, momenta, true);
  std::vector<MuonTensor> tensors;
  for (std::size_t i = 0; i < ws.size(); ++i) tensors.push_back({ws[i], gs.at(i), ms.at(i)});
  StepValues values = make_values(n);
  values.momentum = number<double>(n, "momentum");
  self.run(arrays, [&] {
    const TensorView scratch = arrays.area(self.backend->muon_scratch(tensors));
    const StepValues* const device = self.upload(arrays, values);
    self.timed([&] { self.backend->muon(tensors, rule, device, scratch.data); });
  });
}

void working_copy(Ops& self, const py::dict& inputs, const py::dict& outputs, int clip, double factor) {
  Staged arrays(*self.backend, inputs, outputs);
  const WorkingCopy copy{arrays.master("w"), arrays.find("scale", true), clip, factor, arrays["out"]};
  self.run(arrays, [&] { self.timed([&] { self.backend->working_copies({&copy, 1}); }); });
}

void finish_projection(Ops& self, const py::dict& inputs, const py::dict& outputs, int clip, double factor) {
  Staged arrays(*self.backend, inputs, outputs);
  const ProjectionEnd end{arrays.master("w"),  arrays.master("scale"), clip, factor,
                          arrays.master("dw"), arrays.master("dscale")};
  self.run(arrays, [&] { self.timed([&] { self.backend->finish_projections({&end, 1}); }); });
}

void newton_schulz(Ops& self, const py::array& u, const py::array& out, int count, const Polynomials& polynomials) {
  const NewtonSchulzSteps steps = newton_schulz_steps(count, polynomials);
  Staged arrays(*self.backend);
  const TensorView from = arrays.add(u, false), to = arrays.add(out, true);
  self.run(arrays, [&] {
    const TensorView scratch = arrays.area(self.backend->newton_schulz_scratch(from));
    self.timed([&] { self.backend->newton_schulz(from, to, steps, scratch.data); });
  });
}

void product(Ops& self, const py::dict& inputs, const py::dict& outputs) {
  Staged arrays(*self.backend, inputs, outputs);
  const TensorView a = arrays["a"], b = arrays["b"], out = arrays["out"];
  self.run(arrays, [&] { self.timed([&] { self.backend->product(a, b, out); }); });
}

double rate_of_product(Ops& self, std::int64_t m, std::int64_t n, std::int64_t k,
                       const py::array_t<float, py::array::c_style>& values, double seconds) {
  require(m > 0 && n > 0 && k > 0 && values.size() > 0, "A product's rate needs sizes and values, at least one each.");
  require(self.backend->master_dtype() == DType::f32, "A product's rate is measured in float32 or 16 bits.");
  const Storage storage(*self.backend);
  const float* data = values.data();
  const std::int64_t count = values.size();
  py::gil_scoped_release release;
  std::lock_guard lock(self.mutex);
  NativeCall call;
  if (!storage.converts())
    return product_rate(*self.backend, m, n, k,
                        {reinterpret_cast<const unsigned char*>(data), static_cast<std::size_t>(count) * sizeof(float)},
                        seconds);
  return product_rate(*self.backend, m, n, k, storage.pack(data, count), seconds);
}

void quantize_rows(Ops& self, const py::array& w, int clip, const py::array& q, const py::array& scale) {
  Staged arrays(*self.backend);
  const TensorView from = arrays.add(w, false), to = arrays.add(q, true), scales = arrays.add(scale, true);
  self.run(arrays, [&] { self.timed([&] { self.backend->quantize_rows(from, clip, to, scales); }); });
}

void dequantize_rows(Ops& self, const py::array& q, const py::array& scale, const py::array& w) {
  Staged arrays(*self.backend);
  const TensorView from = arrays.add(q, false), scales = arrays.add(scale, false), to = arrays.add(w, true);
  self.run(arrays, [&] { self.timed([&] { self.backend->dequantize_rows(from, scales, to); }); });
}

// The adapters of one operation. The products' a's are drawn as those of `names`.
AdapterRows make_adapters(Staged& arrays, std::int64_t a_size, double bound, const std::vector<std::string>& names) {
  AdapterRows rows{};
  rows.w = arrays.master("w");
  rows.grad = arrays.find("grad", true);
  rows.m = arrays.master("m");
  rows.v = arrays.master("v");
  rows.copy = arrays["copy"];
  rows.products = static_cast<int>(names.size());
  rows.a_size = a_size;
  rows.bound = bound;
  require(names.size() <= std::size(rows.streams), "An operation has adapters of at most two products.");
  for (std::size_t i = 0; i < names.size(); ++i) rows.streams[i] = crc32(names[i]);
  return rows;
}

void adapters_begin(Ops& self, const py::dict& inputs, const py::dict& outputs, std::uint64_t seed, std::int64_t a_size,
                    double bound, const std::vector<std::string>& names) {
  Staged arrays(*self.backend, inputs, outputs);
  const AdapterRows rows = make_adapters(arrays, a_size, bound, names);
  const TensorView documents = arrays["documents"];
  self.run(arrays, [&] { self.timed([&] { self.backend->adapters_begin({&rows, 1}, documents, seed); }); });
}

void adapters_step(Ops& self, const py::dict& inputs, const py::dict& outputs, const py::kwargs& n) {
  Staged arrays(*self.backend, inputs, outputs);
  const AdapterRows rows = make_adapters(arrays, 0, 0, {});
  const TensorView steps = arrays["steps"];
  const AdapterAdam settings{number<double>(n, "lr"), number<double>(n, "beta1"), number<double>(n, "beta2"),
                             number<double>(n, "eps"), number<double>(n, "grad_scale")};
  self.run(arrays, [&] { self.timed([&] { self.backend->adapters_step({&rows, 1}, steps, settings); }); });
}

double sum(Ops& self, const py::array& x) {
  Staged arrays(*self.backend);
  const TensorView view = arrays.add(x, false);
  double total = 0;
  self.run(arrays, [&] {
    auto* const device = static_cast<double*>(arrays.area(sizeof total).data);
    self.backend->upload(device, &total, sizeof total);
    self.timed([&] { self.backend->add_sum(view, device); });
    self.backend->download(&total, device, sizeof total);
  });
  return total;
}

void axpby(Ops& self, double a, const py::array& x, double b, const py::array& y) {
  Staged arrays(*self.backend);
  const TensorView from = arrays.add(x, false), to = arrays.add(y, true);
  self.run(arrays, [&] { self.backend->axpby(a, from, b, to, nullptr); });
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
  c.def(py::init<int, const std::string&>(), py::arg("device"), py::arg("dtype"));
  c.def_readonly("seconds", &Ops::seconds);
  c.def_readwrite("repeats", &Ops::repeats);
  c.def("description", [](const Ops& self) { return self.backend->description(); });
  def_forward(c, "embed", make_embed, &Backend::embed_bytes, &Backend::embed_forward);
  def_backward(c, "embed_backward", make_embed, make_embed_grads, &Backend::embed_bytes, &Backend::embed_backward);
  def_forward(c, "qkv", make_qkv, &Pieces::qkv_bytes, &Pieces::qkv_forward);
  def_backward(c, "qkv_backward", make_qkv, make_qkv_grads, &Pieces::qkv_bytes, &Pieces::qkv_backward);
  def_backward(c, "heads_backward", make_qkv, make_qkv_grads, &Pieces::qkv_bytes, heads_backward);
  def_forward(c, "attention", make_attention, &Pieces::attention_bytes, &Pieces::attention_forward);
  def_backward(c, "attention_backward", make_attention, make_attention_grads, &Pieces::attention_bytes,
               &Pieces::attention_backward);
  def_forward(c, "project_residual", make_project_residual, &Pieces::project_residual_bytes,
              &Pieces::project_residual_forward);
  def_backward(c, "project_residual_backward", make_project_residual, make_project_residual_grads,
               &Pieces::project_residual_bytes, &Pieces::project_residual_backward);
  def_forward(c, "mlp_up", make_mlp_up, &Pieces::mlp_up_bytes, &Pieces::mlp_up_forward);
  def_backward(c, "mlp_up_backward", make_mlp_up, make_mlp_up_grads, &Pieces::mlp_up_bytes, &Pieces::mlp_up_backward);
  def_forward(c, "head_logits", make_head, &Backend::head_bytes, &Backend::head_logits);
  def_forward(c, "head_loss", make_head, &Backend::head_bytes, &Backend::head_loss);
  def_backward(c, "head_loss_backward", make_head, make_head_grads, &Backend::head_bytes, &Backend::head_loss_backward);
  def_sublayer_forward(c, "attention_sublayer", make_attention_sublayer, &Backend::attention_sublayer_memory,
                       &Backend::attention_sublayer_forward);
  def_sublayer_backward(c, "attention_sublayer_backward", make_attention_sublayer, make_attention_sublayer_grads,
                        &Backend::attention_sublayer_memory, &Backend::attention_sublayer_backward);
  def_sublayer_forward(c, "mlp_sublayer", make_mlp_sublayer, &Backend::mlp_sublayer_memory,
                       &Backend::mlp_sublayer_forward);
  def_sublayer_backward(c, "mlp_sublayer_backward", make_mlp_sublayer, make_mlp_sublayer_grads,
                        &Backend::mlp_sublayer_memory, &Backend::mlp_sublayer_backward);
  c.def("mlp_down_factor", [](const Ops& self) { return self.backend->mlp_down_factor(); });
  c.def("grad_norm", &grad_norm);
  c.def("adam", &adam);
  c.def("adapters_begin", &adapters_begin);
  c.def("adapters_step", &adapters_step);
  c.def("muon", &muon);
  c.def("newton_schulz", &newton_schulz);
  c.def("product", &product);
  c.def("product_rate", &rate_of_product, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("values"),
        py::arg("seconds"));
  c.def("working_copy", &working_copy);
  c.def("finish_projection", &finish_projection);
  c.def("quantize_rows", &quantize_rows);
  c.def("dequantize_rows", &dequantize_rows);
  c.def("sum", &sum);
  c.def("axpby", &axpby);
  m.def("run_tasks", &run_python_tasks, py::arg("count"), py::arg("function"));
}

}  // namespace pgolf
