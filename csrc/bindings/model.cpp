#include <map>
#include <mutex>

#include "bindings/bindings.h"
#include "bindings/model.h"
#include "core/error.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "device/cuda_library.h"
#include "model/adapters.h"
#include "model/decode.h"

namespace py = pybind11;

namespace pgolf {
namespace {

ModelConfig config_from(const py::dict& d) {
  ModelConfig c{};
  const auto get = [&](const char* key, auto& field) {
    field = d[key].cast<std::remove_reference_t<decltype(field)>>();
  };
  get("vocab_size", c.vocab_size);
  get("num_layers", c.num_layers);
  get("model_dim", c.model_dim);
  get("num_heads", c.num_heads);
  get("num_kv_heads", c.num_kv_heads);
  get("mlp_hidden", c.mlp_hidden);
  get("mlp_negative_slope", c.mlp_negative_slope);
  get("ln_scale", c.ln_scale);
  get("tie_embeddings", c.tie_embeddings);
  get("tied_embed_init_std", c.tied_embed_init_std);
  get("logit_softcap", c.logit_softcap);
  get("rope_base", c.rope_base);
  get("rope_dims", c.rope_dims);
  get("loop_start", c.loop_start);
  get("loop_end", c.loop_end);
  get("num_loops", c.num_loops);
  get("qk_gain_init", c.qk_gain_init);
  get("bigram_vocab_size", c.bigram_vocab_size);
  get("bigram_dim", c.bigram_dim);
  get("smear_reset_at_bos", c.smear_reset_at_bos);
  get("bos_id", c.bos_id);
  get("rope_tables_bf16", c.rope_tables_bf16);
  return c;
}

struct NativeAdapters {
  NativeAdapters(NativeModel& m, const AdapterSettings& settings) : model(m), adapters(m.gpt, settings) {}
  NativeModel& model;  // kept alive by Python
  DocumentAdapters adapters;
  std::int64_t allocations = 0;
};

void bind_adapters(py::module_& m) {
  py::class_<NativeAdapters>(m, "DocumentAdapters")
      .def(py::init([](NativeModel& model, std::int64_t rows, std::int64_t rank,
                       const std::vector<std::pair<std::int64_t, std::int64_t>>& windows, std::uint64_t seed, double lr,
                       double beta1, double beta2, double eps) {
             AdapterSettings settings{rows, rank, {}, seed, lr, beta1, beta2, eps};
             for (const auto& [length, first] : windows) settings.windows.push_back({length, first});
             py::gil_scoped_release release;
             std::lock_guard lock(model.mutex);
             return std::make_unique<NativeAdapters>(model, settings);
           }),
           py::arg("model"), py::arg("rows"), py::arg("rank"), py::arg("windows"), py::arg("seed"), py::arg("lr"),
           py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::keep_alive<1, 2>())
      .def(
          "begin",
          [](NativeAdapters& self, const Int32Array& documents) {
            require(documents.size() == self.adapters.settings().rows, "begin needs a document for every row.");
            const auto* rows = documents.data();
            py::gil_scoped_release release;
            std::lock_guard lock(self.model.mutex);
            self.adapters.begin(rows);
          },
          py::arg("documents"))
      .def(
          "window",
          [](NativeAdapters& self, const Int32Array& ids, const Int32Array& targets, const Int32Array& scored,
             const Int32Array& steps, std::int64_t first) {
            const std::int64_t rows = self.adapters.settings().rows;
            require(ids.ndim() == 2 && ids.shape(0) == rows && targets.size() == ids.size() &&
                        scored.size() == 2 * rows && steps.size() == rows,
                    "window needs ids and targets [rows, T], scored [rows, 2] and steps [rows].");
            const WindowShape shape{ids.shape(1), first};
            const std::int32_t *in = ids.data(), *goal = targets.data(), *at = scored.data(), *t = steps.data();
            py::gil_scoped_release release;
            std::lock_guard lock(self.model.mutex);
            const auto before = allocation_count();
            const int ticket = self.adapters.window(in, goal, at, t, shape);
            self.allocations = allocation_count() - before;
            return ticket;
          },
          py::arg("ids"), py::arg("targets"), py::arg("scored"), py::arg("steps"), py::arg("first"))
      .def(
          "read",
          [](NativeAdapters& self, std::size_t index, bool gradients) {
            const AdapterRows& rows = self.adapters.adapters().at(index);
            return read_tensor(self.model, gradients ? rows.grad : rows.w, {rows.w.shape[0], rows.w.shape[1]});
          },
          py::arg("index"), py::arg("gradients"))
      .def("bytes", [](const NativeAdapters& self) { return self.adapters.bytes(); })
      .def_readonly("allocations", &NativeAdapters::allocations, "Native allocations of the last window.");
}

py::array empty(DType dtype, std::vector<py::ssize_t> shape) {
  return py::array(py::dtype(dtype == DType::f64 ? "float64" : "float32"), std::move(shape));
}

struct NativeDecoder {
  NativeDecoder(NativeModel& m, std::int64_t positions) : model(m), decoder(m.gpt, positions) {}
  NativeModel& model;  // kept alive by Python
  Decoder decoder;
};

void bind_decoder(py::module_& m) {
  py::class_<NativeDecoder>(m, "Decoder")
      .def(py::init([](NativeModel& model, std::int64_t positions) {
             py::gil_scoped_release release;
             std::lock_guard lock(model.mutex);
             return std::make_unique<NativeDecoder>(model, positions);
           }),
           py::arg("model"), py::arg("positions"), py::keep_alive<1, 2>())
      .def(
          "read",
          [](NativeDecoder& self, const Int32Array& ids) {
            require(ids.ndim() == 1, "read needs ids of one dimension.");
            const GPT& gpt = *self.model.gpt;
            py::array out = empty(gpt.backend().master_dtype(), {gpt.config().vocab_size});
            const auto* in = ids.data();
            const auto count = static_cast<std::int64_t>(ids.size());
            void* to = out.mutable_data();
            {
              py::gil_scoped_release release;
              std::lock_guard lock(self.model.mutex);
              self.decoder.read(in, count, to);
            }
            return out;
          },
          py::arg("ids"))
      .def_property_readonly("length", [](const NativeDecoder& self) { return self.decoder.length(); })
      .def_property_readonly("room", [](const NativeDecoder& self) { return self.decoder.room(); });
}

}  // namespace

NewtonSchulzSteps newton_schulz_steps(int steps, const Polynomials& polynomials) {
  require(steps >= 1, "The number of Newton–Schulz steps is ", steps, "; it must be at least 1.");
  require(!polynomials.empty() && polynomials.size() <= NewtonSchulzSteps::kMost, "There are ", polynomials.size(),
          " Newton–Schulz polynomials; expected from 1 to ", NewtonSchulzSteps::kMost, ".");
  NewtonSchulzSteps out;
  out.steps = steps;
  out.count = 0;
  for (const auto& [a, b, c] : polynomials) out.polynomials[out.count++] = {a, b, c};
  return out;
}

std::unique_ptr<Backend> make_backend(int device, const std::string& dtype) {
  const auto types = std::map<std::string, DType>{
      {"float32", DType::f32}, {"float64", DType::f64}, {"bfloat16", DType::bf16}, {"float16", DType::f16}};
  const auto found = types.find(dtype);
  require(found != types.end(), "The dtype is ", dtype, "; expected float32, float64, bfloat16 or float16.");
  const DType type = found->second;
  if (device < 0) return make_cpu_backend(type == DType::f64 ? type : DType::f32, type);
  require(type != DType::f64, "The dtype is float64; a model on a GPU is bfloat16, float16 or float32.");
  return make_cuda_backend(device, type);
}

NativeModel::NativeModel(const py::dict& config, std::optional<std::uint64_t> seed, int device,
                         const std::string& dtype) {
  const ModelConfig parsed = config_from(config);
  py::gil_scoped_release release;
  gpt = std::make_shared<GPT>(parsed, make_backend(device, dtype), seed);
}

py::array read_tensor(NativeModel& model, const TensorView& t, const std::vector<std::int64_t>& shape) {
  py::array out = empty(t.dtype, std::vector<py::ssize_t>(shape.begin(), shape.end()));
  void* data = out.mutable_data();
  py::gil_scoped_release release;
  std::lock_guard lock(model.mutex);
  model.gpt->backend().download(data, t.data, t.bytes());
  return out;
}

void write_tensor(NativeModel& model, const TensorView& t, const std::string& name, const py::array& values) {
  const bool wide = t.dtype == DType::f64;
  if (!values.dtype().is(py::dtype(wide ? "float64" : "float32")) || !(values.flags() & py::array::c_style) ||
      values.size() != t.size())
    throw std::invalid_argument(name + " needs a C-contiguous array of " + std::to_string(t.size()) + " numbers of " +
                                (wide ? "float64" : "float32") + ".");
  const void* data = values.data();
  py::gil_scoped_release release;
  std::lock_guard lock(model.mutex);
  model.gpt->backend().upload(t.data, data, t.bytes());
}

void bind_model(py::module_& m) {
  py::class_<NativeModel>(m, "Model")
      .def(py::init<const py::dict&, std::optional<std::uint64_t>, int, const std::string&>(), py::arg("config"),
           py::arg("seed"), py::arg("device"), py::arg("dtype"))
      .def("description", [](const NativeModel& self) { return self.gpt->backend().description(); })
      .def("read",
           [](NativeModel& self, const std::string& name) {
             const std::size_t i = self.gpt->index_of(name);
             return read_tensor(self, self.gpt->weights()[i], self.gpt->table()[i].shape);
           })
      .def("read_grad",
           [](NativeModel& self, const std::string& name) {
             const std::size_t i = self.gpt->index_of(name);
             return read_tensor(self, self.gpt->grads()[i], self.gpt->table()[i].shape);
           })
      .def("write",
           [](NativeModel& self, const std::string& name, const py::array& values) {
             write_tensor(self, self.gpt->weights()[self.gpt->index_of(name)], name, values);
             self.gpt->weights_changed();
           })
      .def(
          "logits",
          [](NativeModel& self, const Int32Array& ids, std::int64_t first) {
            const auto B = ids.shape(0), T = ids.shape(1);
            const ModelConfig& c = self.gpt->config();
            py::array out =
                empty(self.gpt->backend().master_dtype(), {B, std::max<py::ssize_t>(T - first, 0), c.vocab_size});
            const auto* in = ids.data();
            void* to = out.mutable_data();
            {
              py::gil_scoped_release release;
              std::lock_guard lock(self.mutex);
              self.gpt->logits(in, B, T, first, to);
            }
            return out;
          },
          py::arg("ids"), py::arg("first"))
      .def(
          "losses",
          [](NativeModel& self, const Int32Array& ids, const Int32Array& targets, std::int64_t first) {
            const auto B = ids.shape(0), T = ids.shape(1);
            py::array out = empty(self.gpt->backend().master_dtype(), {B, std::max<py::ssize_t>(T - first, 0)});
            const auto *in = ids.data(), *goal = targets.data();
            void* to = out.mutable_data();
            {
              py::gil_scoped_release release;
              std::lock_guard lock(self.mutex);
              self.gpt->losses(in, goal, B, T, first, to);
            }
            return out;
          },
          py::arg("ids"), py::arg("targets"), py::arg("first"))
      .def(
          "losses_later",
          [](NativeModel& self, const Int32Array& ids, const Int32Array& targets, std::int64_t first) {
            const auto B = ids.shape(0), T = ids.shape(1);
            const auto *in = ids.data(), *goal = targets.data();
            py::gil_scoped_release release;
            std::lock_guard lock(self.mutex);
            return self.gpt->losses_later(in, goal, B, T, first);
          },
          py::arg("ids"), py::arg("targets"), py::arg("first"))
      .def(
          "wait_losses",
          [](NativeModel& self, int ticket, std::int64_t B, std::int64_t count) {
            py::array out = empty(self.gpt->backend().master_dtype(), {B, count});
            void* to = out.mutable_data();
            const auto bytes = static_cast<std::size_t>(out.nbytes());
            {
              py::gil_scoped_release release;
              std::lock_guard lock(self.mutex);
              self.gpt->backend().wait(ticket, to, bytes);
            }
            return out;
          },
          py::arg("ticket"), py::arg("batch_seqs"), py::arg("count"))
      .def(
          "set_qat_clips",
          [](NativeModel& self, const std::map<std::string, int>& by_name) {
            std::vector<int> clips(self.gpt->table().size(), 0);
            for (const auto& [name, clip] : by_name) clips[self.gpt->index_of(name)] = clip;
            std::lock_guard lock(self.mutex);
            self.gpt->set_qat_clips(clips);
          },
          py::arg("clips"))
      .def_property(
          "looping", [](NativeModel& self) { return self.gpt->looping(); },
          [](NativeModel& self, bool looping) {
            std::lock_guard lock(self.mutex);
            self.gpt->set_looping(looping);
          })
      .def(
          "begin_step",
          [](NativeModel& self, bool qat) {
            py::gil_scoped_release release;
            std::lock_guard lock(self.mutex);
            const auto before = allocation_count();
            self.gpt->begin_step(qat);
            self.step_allocations = allocation_count() - before;
          },
          py::arg("qat"))
      .def(
          "micro_step",
          [](NativeModel& self, const Int32Array& ids, const Int32Array& targets, double loss_scale) {
            const auto B = ids.shape(0), T = ids.shape(1);
            const auto *in = ids.data(), *goal = targets.data();
            py::gil_scoped_release release;
            std::lock_guard lock(self.mutex);
            const auto before = allocation_count();
            self.gpt->micro_step(in, goal, B, T, loss_scale);
            self.step_allocations += allocation_count() - before;
          },
          py::arg("ids"), py::arg("targets"), py::arg("loss_scale"))
      .def("end_step",
           [](NativeModel& self) {
             py::gil_scoped_release release;
             std::lock_guard lock(self.mutex);
             const auto before = allocation_count();
             self.gpt->end_step();
             self.step_allocations += allocation_count() - before;
           })
      .def("loss_sum",
           [](NativeModel& self) {
             py::gil_scoped_release release;
             std::lock_guard lock(self.mutex);
             return self.gpt->loss_sum();
           })
      .def("loss_scale",
           [](NativeModel& self) {
             py::gil_scoped_release release;
             std::lock_guard lock(self.mutex);
             double scale;
             self.gpt->backend().download(&scale, &self.gpt->values()->loss_scale, sizeof scale);
             return scale;
           })
      .def("training_bytes",
           [](NativeModel& self, std::int64_t B, std::int64_t T) {
             std::lock_guard lock(self.mutex);
             return self.gpt->training_bytes(B, T);
           })
      .def("memory_limit", [](NativeModel& self) { return self.gpt->backend().memory_limit(); })
      .def("peak_memory",
           [](NativeModel& self) {
             std::lock_guard lock(self.mutex);
             return self.gpt->backend().peak_memory();
           })
      .def_readonly("step_allocations", &NativeModel::step_allocations,
                    "Native allocations made by the current step's calls so far.")
      .def(
          "prepare_training",
          [](NativeModel& self, std::int64_t B, std::int64_t T) {
            py::gil_scoped_release release;
            std::lock_guard lock(self.mutex);
            self.gpt->prepare(Mode::train, B, T);
          },
          py::arg("batch_seqs"), py::arg("seq_len"))
      .def("memory_table", [](NativeModel& self) {
        py::list rows;
        std::lock_guard lock(self.mutex);
        for (const MemoryRow& row : self.gpt->memory_table()) rows.append(py::make_tuple(row.what, row.bytes));
        return rows;
      });

  bind_adapters(m);
  bind_decoder(m);

  m.def(
      "parameter_table",
      [](const py::dict& config) {
        const ModelConfig parsed = config_from(config);
        parsed.validate();
        py::list shapes;
        const ParameterTable table = parameter_table(parsed);
        for (const ParameterSpec& spec : table.specs)
          shapes.append(py::make_tuple(spec.name, py::tuple(py::cast(spec.shape))));
        return shapes;
      },
      py::arg("config"), "(name, shape) of every parameter that a configuration implies.");

  m.def(
      "newton_schulz",
      [](const py::array& u, int count, const Polynomials& polynomials) {
        const NewtonSchulzSteps steps = newton_schulz_steps(count, polynomials);
        const bool wide = u.dtype().is(py::dtype("float64"));
        const DType type = wide ? DType::f64 : DType::f32;
        py::array out = empty(type, {u.shape(0), u.shape(1)});
        const TensorView in(type, {u.shape(0), u.shape(1)}, const_cast<void*>(u.data()));
        const TensorView to(type, {u.shape(0), u.shape(1)}, out.mutable_data());
        py::gil_scoped_release release;
        NativeCall call;
        const auto backend = make_cpu_backend(type, type);
        DeviceMemory scratch;
        scratch.reserve(*backend, backend->newton_schulz_scratch(in));
        backend->newton_schulz(in, to, steps, scratch.data());
        return out;
      },
      py::arg("u"), py::arg("steps"), py::arg("polynomials"));
}

}  // namespace pgolf
