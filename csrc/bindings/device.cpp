#include "bindings/bindings.h"
#include "device/cuda_library.h"

namespace py = pybind11;

namespace pgolf {

void bind_device(py::module_& m) {
  // Wheels put cuBLASLt into one of these, which are not looked at before a GPU is asked for.
  std::vector<std::string> folders;
  const py::object encode = py::module_::import("os").attr("fsencode");
  for (const auto& entry : py::list(py::module_::import("sys").attr("path")))
    if (py::isinstance<py::str>(entry) && py::len(entry) > 0)
      folders.push_back(encode(entry).cast<std::string>() + "/nvidia/cu13/lib");
  set_library_folders(std::move(folders));

  py::class_<CudaDevice>(m, "CudaDevice")
      .def_readonly("name", &CudaDevice::name)
      .def_property_readonly("capability", [](const CudaDevice& d) { return py::make_tuple(d.major, d.minor); })
      .def_readonly("memory", &CudaDevice::memory)
      .def_readonly("problem", &CudaDevice::problem);
  py::class_<CudaStatus>(m, "CudaStatus")
      .def_property_readonly("usable", [](const CudaStatus& s) { return s.missing.empty(); })
      .def_readonly("missing", &CudaStatus::missing)
      .def_readonly("problem", &CudaStatus::problem)
      .def_readonly("library", &CudaStatus::library)
      .def_readonly("compiled_for", &CudaStatus::compiled_for)
      .def_readonly("runtime", &CudaStatus::runtime)
      .def_readonly("driver", &CudaStatus::driver)
      .def_readonly("devices", &CudaStatus::devices)
      .def_property_readonly("cublaslt",
                             [](const CudaStatus& s) { return py::make_tuple(s.cublaslt.path, s.cublaslt.version); });
  m.def("cuda_status", &cuda_status, py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_dtype", [](int device) { return cuda_dtype(device) == DType::bf16 ? "bfloat16" : "float16"; },
      py::arg("device"));
  m.def("open_cublaslt", [] {
    const CublasLt found = open_cublaslt();
    return py::make_tuple(found.path, found.version);
  });
  m.def("build_stamp", &build_stamp);
}

}  // namespace pgolf
