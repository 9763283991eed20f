#include "optim/optimizer.h"

#include "bindings/model.h"
#include "core/memory.h"

namespace py = pybind11;

namespace pgolf {
namespace {

struct NativeOptimizer {
  NativeOptimizer(NativeModel& m, const MuonRule& rule) : model(m), optimizer(m.gpt, rule) {}
  NativeModel& model;  // kept alive by Python
  Optimizer optimizer;
};

StepSettings settings_from(const py::dict& d) {
  StepSettings s{};
  const auto groups = [&](const char* key, double* out) {
    const auto values = d[key].cast<std::array<double, kGroups>>();
    std::copy(values.begin(), values.end(), out);
  };
  groups("lr", s.lr);
  groups("weight_decay", s.weight_decay);
  s.beta1 = d["beta1"].cast<double>();
  s.beta2 = d["beta2"].cast<double>();
  s.eps = d["eps"].cast<double>();
  s.momentum = d["momentum"].cast<double>();
  s.clip = d["clip"].cast<double>();
  return s;
}

template <class F>
auto locked(NativeOptimizer& self, F&& body) {
  py::gil_scoped_release release;
  std::lock_guard lock(self.model.mutex);
  return body();
}

const TensorView find_state(const NativeOptimizer& self, const std::string& name) {
  for (const auto& state : self.optimizer.state())
    if (state.name == name) return state.tensor;
  throw std::invalid_argument("The optimizer has no state named " + name + ".");
}

}  // namespace

void bind_optim(py::module_& m) {
  py::class_<NativeOptimizer>(m, "Optimizer")
      .def(py::init([](NativeModel& model, int steps, const Polynomials& polynomials, bool normalize_rows) {
             return std::make_unique<NativeOptimizer>(
                 model, MuonRule{newton_schulz_steps(steps, polynomials), normalize_rows});
           }),
           py::arg("model"), py::arg("ns_steps"), py::arg("polynomials"), py::arg("normalize_rows"),
           py::keep_alive<1, 2>())
      .def(
          "step",
          [](NativeOptimizer& self, const py::dict& settings) {
            const StepSettings s = settings_from(settings);
            return locked(self, [&] {
              const auto before = allocation_count();
              const int ticket = self.optimizer.step(s);
              self.model.step_allocations += allocation_count() - before;
              return ticket;
            });
          },
          py::arg("settings"), "Applies the gradients; returns a ticket for `wait`.")
      .def(
          "wait",
          [](NativeOptimizer& self, int ticket) {
            const StepResult r = locked(self, [&] { return self.optimizer.wait(ticket); });
            return py::make_tuple(r.loss_sum, r.grad_norm, r.finite, r.saturated, r.overflows);
          },
          py::arg("ticket"),
          "Waits for a step: (sum of its losses, gradient norm, finite, saturated values, overflows in a row).")
      .def("go_on", [](NativeOptimizer& self) { locked(self, [&] { self.optimizer.go_on(); }); })
      .def(
          "warm_up",
          [](NativeOptimizer& self, const std::vector<std::int64_t>& batches, std::int64_t T, double loss_scale,
             bool qat, bool looping, bool averaging) {
            locked(self, [&] { self.optimizer.warm_up(batches, T, loss_scale, qat, looping, averaging); });
          },
          py::arg("batches"), py::arg("seq_len"), py::arg("loss_scale"), py::arg("qat"), py::arg("looping"),
          py::arg("averaging"))
      .def_property(
          "counts",
          [](NativeOptimizer& self) {
            const StepCounts c = locked(self, [&] { return self.optimizer.counts(); });
            return py::make_tuple(c.adam_steps, c.loss_scale, c.clean);
          },
          [](NativeOptimizer& self, const std::tuple<std::int64_t, double, std::int64_t>& c) {
            locked(self, [&] { self.optimizer.set_counts({std::get<0>(c), std::get<1>(c), std::get<2>(c)}); });
          })
      .def_property(
          "snapshots", [](const NativeOptimizer& self) { return self.optimizer.snapshots(); },
          [](NativeOptimizer& self, std::int64_t n) { self.optimizer.set_snapshots(n); })
      .def("add_snapshot", [](NativeOptimizer& self) { locked(self, [&] { self.optimizer.add_snapshot(); }); })
      .def("use_snapshot_mean",
           [](NativeOptimizer& self) { locked(self, [&] { self.optimizer.use_snapshot_mean(); }); })
      .def("start_ema", [](NativeOptimizer& self) { locked(self, [&] { self.optimizer.start_ema(); }); })
      .def(
          "update_ema",
          [](NativeOptimizer& self, double decay) { locked(self, [&] { self.optimizer.update_ema(decay); }); },
          py::arg("decay"))
      .def("use_ema", [](NativeOptimizer& self) { locked(self, [&] { self.optimizer.use_ema(); }); })
      .def("state_names",
           [](const NativeOptimizer& self) {
             std::vector<std::string> names;
             for (const auto& state : self.optimizer.state()) names.push_back(state.name);
             return names;
           })
      .def("read",
           [](NativeOptimizer& self, const std::string& name) {
             const TensorView t = find_state(self, name);
             return read_tensor(self.model, t, {t.shape, t.shape + t.rank});
           })
      .def("write", [](NativeOptimizer& self, const std::string& name,
                       const py::array& values) { write_tensor(self.model, find_state(self, name), name, values); })
      .def("bytes", [](const NativeOptimizer& self) { return self.optimizer.bytes(); });
}

}  // namespace pgolf
