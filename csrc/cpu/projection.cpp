// Projections back into the residual stream. The scale is folded into a copy of the weights
// (d × c numbers), so that forward and data gradient are plain products onto the residual.
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

PGOLF_CPU_BEGIN
namespace {

template <class T>
const T* scaled_weights(const ProjectResidual& op, const TensorView& scratch) {
  const i64 d = op.w.shape[0], c = op.w.shape[1];
  T* scaled = scratch.as<T>();
  for_row_chunks(d, [&](i64 first, i64 count, int) {
    for (i64 i = first; i < first + count; ++i) {
      const T factor = op.scale.as<T>()[i];
      const T* w = op.w.as<T>() + i * c;
      PGOLF_SIMD
      for (i64 j = 0; j < c; ++j) scaled[i * c + j] = factor * w[j];
    }
  });
  return scaled;
}

}  // namespace

template <class T>
OpBytes CpuBackend<T>::bytes(const ProjectResidual& op) const {
  const std::size_t weights = op.w.bytes();
  return {0, weights, weights};
}

template <class T>
void CpuBackend<T>::project_residual_forward(const ProjectResidual& op) {
  const i64 N = op.out.shape[0] * op.out.shape[1], d = op.w.shape[0], c = op.w.shape[1];
  const T* scaled = scaled_weights<T>(op, op.scratch);
  for_row_chunks(N, [&](i64 first, i64 count, int) {
    T* out = op.out.as<T>() + first * d;
    if (op.mixed.x) {
      const MixedRows<T> residual(op.mixed);
      for (i64 i = 0; i < count; ++i) residual.read(first + i, out + i * d);
    } else if (op.x.data != op.out.data) {
      const T* x = op.x.as<T>() + first * d;
      PGOLF_SIMD
      for (i64 i = 0; i < count * d; ++i) out[i] = x[i];
    }
    gemm<T>(kPlain, kTransposed, count, d, c, T(1), op.a.as<T>() + first * c, c, scaled, c, T(1), out, d);
  });
}

template <class T>
void CpuBackend<T>::project_residual_backward(const ProjectResidual& op, const ProjectResidualGrads& grads) {
  const i64 N = op.out.shape[0] * op.out.shape[1], d = op.w.shape[0], c = op.w.shape[1];
  const T *scaled = scaled_weights<T>(op, grads.scratch), *dout = grads.dout.as<T>();
  for_row_chunks(N, [&](i64 first, i64 count, int) {
    gemm<T>(kPlain, kPlain, count, c, d, T(1), dout + first * d, d, scaled, c, T(0), grads.da.as<T>() + first * c, c);
  });
  gemm_weight_gradients<T>(N, c, T(1), op.a.as<T>(), {{dout, d, grads.w.as<T>()}});
}

template <class T>
void CpuBackend<T>::finish_projection(const ProjectResidual& op, const ProjectResidualGrads& grads) {
  const i64 c = op.w.shape[1];
  for_row_chunks(op.w.shape[0], [&](i64 first, i64 count, int) {
    for (i64 i = first; i < first + count; ++i) {
      T* g = grads.w.as<T>() + i * c;
      grads.scale.as<T>()[i] += dot(op.w.as<T>() + i * c, g, c);
      const T factor = op.scale.as<T>()[i];
      PGOLF_SIMD
      for (i64 j = 0; j < c; ++j) g[j] *= factor;
    }
  });
}

#define PGOLF_INSTANTIATE(T)                                                                                   \
  template OpBytes CpuBackend<T>::bytes(const ProjectResidual&) const;                                         \
  template void CpuBackend<T>::project_residual_forward(const ProjectResidual&);                               \
  template void CpuBackend<T>::project_residual_backward(const ProjectResidual&, const ProjectResidualGrads&); \
  template void CpuBackend<T>::finish_projection(const ProjectResidual&, const ProjectResidualGrads&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
