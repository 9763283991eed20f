// fp16 numbers cross as uint16 bit patterns; pgolf.quantize checks shapes and arguments before it calls.
#include "bindings/bindings.h"
#include "quant/coder.h"
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

py::bytes as_bytes(const std::vector<std::uint8_t>& stream) {
  return {reinterpret_cast<const char*>(stream.data()), stream.size()};
}

py::bytes encode_integers(const Integers& q, const Halves& scale) {
  const py::ssize_t rows = q.shape(0), columns = q.shape(1);
  const auto* q_in = q.data();
  const auto* scale_in = scale.data();
  std::vector<std::uint8_t> stream;
  {
    py::gil_scoped_release release;
    stream = quant::encode_integers(q_in, scale_in, rows, columns);
  }
  return as_bytes(stream);
}

py::tuple decode_integers(std::string_view stream, py::ssize_t rows, py::ssize_t columns) {
  Integers q({rows, columns});
  Halves scale(rows);
  auto* q_out = q.mutable_data();
  auto* scale_out = scale.mutable_data();
  {
    py::gil_scoped_release release;
    quant::decode_integers(reinterpret_cast<const std::uint8_t*>(stream.data()), stream.size(), rows, columns, q_out,
                           scale_out);
  }
  return py::make_tuple(std::move(q), std::move(scale));
}

template <class Bits>
py::bytes encode_floats(const py::array_t<Bits, py::array::c_style>& values) {
  const py::ssize_t rows = values.shape(0), columns = values.shape(1);
  const Bits* in = values.data();
  std::vector<std::uint8_t> stream;
  {
    py::gil_scoped_release release;
    stream = quant::encode_floats(in, rows, columns);
  }
  return as_bytes(stream);
}

template <class Bits>
py::array decode_floats(std::string_view stream, py::ssize_t rows, py::ssize_t columns) {
  py::array_t<Bits, py::array::c_style> values({rows, columns});
  Bits* out = values.mutable_data();
  {
    py::gil_scoped_release release;
    quant::decode_floats(reinterpret_cast<const std::uint8_t*>(stream.data()), stream.size(), rows, columns, out);
  }
  return values;
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
  m.def(
      "quantize_rows_rms",
      [](const Floats& w, double steps) {
        return quantize_matrix(w, [steps](const float* source, auto rows, auto columns, auto* q, auto* scale) {
          quant::quantize_rows_rms(source, rows, columns, steps, q, scale);
        });
      },
      py::arg("w").noconvert(), py::arg("steps"));
  m.def("encode_integers", &encode_integers, py::arg("q").noconvert(), py::arg("scale").noconvert());
  m.def("decode_integers", &decode_integers, py::arg("stream"), py::arg("rows"), py::arg("columns"));
  m.def("encode_floats", &encode_floats<std::uint16_t>, py::arg("bits").noconvert());
  m.def("encode_floats", &encode_floats<std::uint32_t>, py::arg("bits").noconvert());
  m.def("decode_halves", &decode_floats<std::uint16_t>, py::arg("stream"), py::arg("rows"), py::arg("columns"));
  m.def("decode_singles", &decode_floats<std::uint32_t>, py::arg("stream"), py::arg("rows"), py::arg("columns"));
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
