// pybind11 face of the library, no logic: a file for each folder that Python calls, and one for backend.h's operations.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace pgolf {

void bind_core(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_model(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_products(pybind11::module_& m);
void bind_quant(pybind11::module_& m);

// Arrays as kernels want them; the package's Python side converts dtypes before it calls.
using Int32Array = pybind11::array_t<std::int32_t, pybind11::array::c_style>;

}  // namespace pgolf
