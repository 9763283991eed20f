// fp16 numbers cross as uint16 bit patterns; pgolf.quantize checks shapes and arguments before it calls.
#include "bindings/bindings.h"
#include "quant/rows.h"

namespace py = pybind11;

namespace pgolf {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Halves = py::array_t<std::uint16_t, py::array::c_style>;
using Integers = py::array_t<std::int8_t, py::array::c_style>;

// Runs quantize(w, rows, columns, q, scale) without the GIL on fresh outputs.
template <class Quantize>
py::tuple quantize_matrix(const Floats& w, Quantize quantize) {
  const py::ssize_t rows = w.shape(0), columns = w.shape(1);
  Integers q({rows, columns});
  Halves scale(rows);
  const float* source = w.data();
  auto* q_out = q.mutable_data();
  auto* scale_out = scale.mutable_data();
  {
    py::gil_scoped_release release;
    quantize(source, rows, columns, q_out, scale_out);
  }
  return py::make_tuple(std::move(q), std::move(scale));
}

Floats dequantize_rows(const Integers& q, const Halves& scale) {
  const py::ssize_t rows = q.shape(0), columns = q.shape(1);
  Floats w({rows, columns});
  const auto* q_in = q.data();
  const auto* scale_in = scale.data();
  float* out = w.mutable_data();
  py::gil_scoped_release release;
  quant::dequantize_rows(q_in, scale_in, rows, columns, out);
  return w;
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def(
      "quantize_rows_amax",
      [](const Floats& w, int clip) {
        return quantize_matrix(w, [clip](const float* source, auto rows, auto columns, auto* q, auto* scale) {
          quant::quantize_rows_amax(source, rows, columns, clip, q, scale);
        });
      },
      py::arg("w").noconvert(), py::arg("clip"));
  m.def(
      "quantize_rows_quantile_floor",
      [](const Floats& w) { return quantize_matrix(w, quant::quantize_rows_quantile_floor); },
      py::arg("w").noconvert());
  m.def("dequantize_rows", &dequantize_rows, py::arg("q").noconvert(), py::arg("scale").noconvert());
  m.def(
      "prune",
      [](Floats& w, double p) {
        const py::ssize_t count = w.size();
        float* data = w.mutable_data();
        py::gil_scoped_release release;
        quant::prune(data, count, p);
      },
      py::arg("w").noconvert(), py::arg("p"), "Prunes w in place.");
}

}  // namespace pgolf
