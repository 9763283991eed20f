// What a step does to weights besides its optimizer: working copies, the gradients of projections, quantised rows.
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"
#include "quant/rows.h"

PGOLF_CPU_BEGIN

namespace {

// Late QAT's levels of one row, computed in float32 as the artifact's are: values go through `level`.  docs/spec.md §3
struct Levels {
  float clip, sigma;

  template <class T>
  Levels(const T* row, i64 count, int limit) : clip(static_cast<float>(limit)), sigma(1) {
    if (limit == 0) return;
    float top = 0;
    PGOLF_SIMD_MAX(top)
    for (i64 j = 0; j < count; ++j) {
      const float a = std::fabs(static_cast<float>(row[j]));
      top = a > top ? a : top;
    }
    sigma = top / clip > 1e-12f ? top / clip : 1e-12f;
  }
  template <class T>
  PGOLF_INLINE T level(T w) const {
    if (clip == 0) return w;
    const float n = std::nearbyint(static_cast<float>(w) / sigma);
    return T((n > clip ? clip : n < -clip - 1 ? -clip - 1 : n) * sigma);
  }
};

// body(matrix index, row) for every row of several matrices, in parallel.
template <class Matrices, class RowsOf, class F>
void for_all_rows(const Matrices& matrices, RowsOf&& rows_of, F&& body) {
  constexpr i64 kRows = 64;
  i64 all = 0;
  for (const auto& m : matrices) all += chunks_of(rows_of(m), kRows);
  parallel_for(all, [&](i64 task) {
    std::size_t index = 0;
    while (task >= chunks_of(rows_of(matrices[index]), kRows)) task -= chunks_of(rows_of(matrices[index++]), kRows);
    const i64 rows = rows_of(matrices[index]), end = (task + 1) * kRows < rows ? (task + 1) * kRows : rows;
    for (i64 row = task * kRows; row < end; ++row) body(matrices[index], row);
  });
}

}  // namespace

template <class T>
void CpuBackend<T>::working_copies(std::span<const WorkingCopy> copies) {
  const auto rows_of = [](const WorkingCopy& c) { return c.w.shape[0]; };
  for_all_rows(copies, rows_of, [&](const WorkingCopy& c, i64 row) {
    const i64 cols = c.w.shape[1];
    const T* w = c.w.as<T>() + row * cols;
    T* out = c.out.as<T>() + row * cols;
    const Levels levels(w, cols, c.clip);
    const T scale = T(c.factor) * (c.scale ? c.scale.as<T>()[row] : T(1));
    for (i64 j = 0; j < cols; ++j) out[j] = scale * levels.level(w[j]);
    round(out, cols);
  });
}

template <class T>
void CpuBackend<T>::finish_projections(std::span<const ProjectionEnd> projections) {
  const auto rows_of = [](const ProjectionEnd& p) { return p.w.shape[0]; };
  for_all_rows(projections, rows_of, [&](const ProjectionEnd& p, i64 row) {
    const i64 cols = p.w.shape[1];
    const T* w = p.w.as<T>() + row * cols;
    T* dw = p.dw.as<T>() + row * cols;
    const Levels levels(w, cols, p.clip);
    T sum = 0;
    PGOLF_SIMD_SUM(sum)
    for (i64 j = 0; j < cols; ++j) sum += levels.level(w[j]) * dw[j];
    p.dscale.as<T>()[row] += T(p.factor) * sum;
    const T factor = T(p.factor) * p.scale.as<T>()[row];
    PGOLF_SIMD
    for (i64 j = 0; j < cols; ++j) dw[j] *= factor;
  });
}

template <class T>
void CpuBackend<T>::quantize_rows(const TensorView& w, int clip, const TensorView& q, const TensorView& scale) {
  if constexpr (sizeof(T) == 4)
    quant::quantize_rows_amax(w.as<float>(), w.shape[0], w.shape[1], clip, q.as<std::int8_t>(),
                              scale.as<std::uint16_t>());
}

template <class T>
void CpuBackend<T>::dequantize_rows(const TensorView& q, const TensorView& scale, const TensorView& w) {
  if constexpr (sizeof(T) == 4)
    quant::dequantize_rows(q.as<std::int8_t>(), scale.as<std::uint16_t>(), w.shape[0], w.shape[1], w.as<float>());
}

#define PGOLF_INSTANTIATE(T)                                                                                \
  template void CpuBackend<T>::working_copies(std::span<const WorkingCopy>);                                \
  template void CpuBackend<T>::finish_projections(std::span<const ProjectionEnd>);                          \
  template void CpuBackend<T>::quantize_rows(const TensorView&, int, const TensorView&, const TensorView&); \
  template void CpuBackend<T>::dequantize_rows(const TensorView&, const TensorView&, const TensorView&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)

PGOLF_CPU_END
