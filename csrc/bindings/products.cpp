// One matrix product of the CPU's kernels on NumPy arrays: for tests of the order of sums and for benchmarks.
#include <vector>

#include "bindings/bindings.h"
#include "core/error.h"
#include "cpu/product.h"

namespace py = pybind11;

namespace pgolf {
namespace {

// A matrix whose rows are contiguous, at any distance from one another.
struct Matrix {
  const void* data;
  std::int64_t rows, columns, ld;
};

Matrix matrix(const py::array& array, const char* name) {
  require(array.ndim() == 2 && (array.size() == 0 || array.shape(1) < 2 || array.strides(1) == array.itemsize()) &&
              array.strides(0) % array.itemsize() == 0,
          name, " must be a matrix whose rows are contiguous");
  return {array.data(), array.shape(0), array.shape(1), array.strides(0) / array.itemsize()};
}

void multiply(const std::string& kind, const py::array& a, const py::array& b, py::array& c, bool transpose_a,
              bool transpose_b, bool from_c, double alpha) {
  CpuProduct p;
  if (kind == "chain")
    p.kind = CpuProduct::kChain;
  else if (kind == "packed")
    p.kind = CpuProduct::kPacked;
  else if (kind == "blocks")
    p.kind = CpuProduct::kBlocks;
  else if (kind == "packed blocks")
    p.kind = CpuProduct::kPackedBlocks;
  else if (kind == "symmetric")
    p.kind = CpuProduct::kSymmetric;
  else
    require(false, "kind is '", kind, "'; chain, packed, blocks, packed blocks or symmetric was expected");
  const auto is = [&](auto type) { return a.dtype().is(type) && b.dtype().is(type) && c.dtype().is(type); };
  if (is(py::dtype::of<double>()))
    p.dtype = DType::f64;
  else
    require(is(py::dtype::of<float>()), "a, b and c must have one dtype, float32 or float64");
  const Matrix left = matrix(a, "a"), right = matrix(b, "b"), out = matrix(c, "c");
  p.transpose_a = transpose_a, p.transpose_b = transpose_b, p.from_c = from_c, p.alpha = alpha;
  p.m = out.rows, p.n = out.columns, p.k = transpose_a ? left.rows : left.columns;
  require((transpose_a ? left.columns : left.rows) == p.m && (transpose_b ? right.rows : right.columns) == p.n &&
              (transpose_b ? right.columns : right.rows) == p.k,
          "the shapes of a, b and c do not belong to one product");
  require(p.kind != CpuProduct::kSymmetric || (a.data() == b.data() && !transpose_a && transpose_b && out.ld == p.n),
          "a symmetric product is that of a and a transposed, into rows without a gap");
  require(p.kind != CpuProduct::kPacked || !transpose_a, "a packed product takes a as it stands");
  require(p.kind != CpuProduct::kPackedBlocks || transpose_a, "packed blocks take a transposed");
  const bool packs = p.kind == CpuProduct::kPacked || p.kind == CpuProduct::kPackedBlocks;
  p.a = left.data, p.lda = left.ld, p.b = right.data, p.ldb = right.ld, p.c = c.mutable_data(), p.ldc = out.ld;
  // Kept from call to call: fresh pages cost as much as packing what goes there.
  static thread_local std::vector<double> room;
  const std::size_t needed = packs ? static_cast<std::size_t>(packed_numbers(p.n, p.k)) + 8 : 0;
  if (room.size() < needed) room.resize(needed);
  // Kernels read packed panels at any address; a cache line's beginning is fastest.
  p.packed = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(room.data()) + 63) & ~std::uintptr_t{63});
  const py::gil_scoped_release release;
  cpu_product(p);
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("cpu_product", &multiply, py::arg("kind"), py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("c").noconvert(), py::kw_only(), py::arg("transpose_a") = false, py::arg("transpose_b") = false,
        py::arg("from_c") = false, py::arg("alpha") = 1.0);
  m.def("cpu_multiply_adds", &cpu_multiply_adds, py::arg("steps"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace pgolf
