#include "bindings/bindings.h"
#include "core/error.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "pgolf's native core: model, optimizer and quantiser.";
  py::register_exception_translator([](std::exception_ptr error) {
    const auto raise = [](const char* type, const char* message) {
      const py::object cls = py::module_::import("pgolf.common.errors").attr(type);
      PyErr_SetString(cls.ptr(), message);
    };
    try {
      if (error) std::rethrow_exception(error);
    } catch (const pgolf::DeviceError& e) {
      raise("DeviceError", e.what());
    } catch (const pgolf::NonFiniteError& e) {
      raise("NonFiniteError", e.what());
    }
  });
  pgolf::bind_core(m);
  pgolf::bind_device(m);
  pgolf::bind_model(m);
  pgolf::bind_ops(m);
  pgolf::bind_optim(m);
  pgolf::bind_products(m);
  pgolf::bind_quant(m);
}
