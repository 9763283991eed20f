#include "backend.h"
#include "bindings/bindings.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"

namespace py = pybind11;

namespace pgolf {

void bind_core(py::module_& m) {
  m.def("set_num_threads", &set_thread_count, py::arg("count"), py::call_guard<py::gil_scoped_release>());
  m.def("get_num_threads", &thread_count, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_isa", &cpu_isa, "The instruction set that the CPU kernels use: avx512, avx2 or plain.");
  m.def("allocation_count", &allocation_count, "Native allocations since the library was loaded.");
  m.def(
      "philox4x32",
      [](std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
        const PhiloxBlock block = philox4x32(counter, key);
        return py::make_tuple(block[0], block[1], block[2], block[3]);
      },
      py::arg("counter"), py::arg("key"));
}

}  // namespace pgolf
