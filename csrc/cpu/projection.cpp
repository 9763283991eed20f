// Projections back into the residual stream, whose scale is part of the weights' working copy; and the bare product.
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

PGOLF_CPU_BEGIN
namespace {

struct Dims {
  i64 N, d, c;
  explicit Dims(const ProjectResidual& op) : N(op.out.shape[0] * op.out.shape[1]), d(op.w.shape[0]), c(op.w.shape[1]) {}
};

template <class T>
struct ForwardScratch {
  SharedRight<T> w;
  PerWorker<T> row;  // [d] of the mixed input
  ForwardScratch(Layout& layout, int workers, const Dims& s, bool mixed)
      : w(layout, s.N, kTransposed, s.d, s.c), row(layout, workers, mixed ? s.d : 0) {}
};

template <class T>
struct BackwardScratch {
  SharedRight<T> w;
  WeightGradients<T> gradients;
  BackwardScratch(Layout& layout, const Dims& s) : w(layout, s.N, kPlain, s.c, s.d), gradients(layout, s.N, s.c) {}
};

}  // namespace

template <class T>
OpBytes CpuBackend<T>::project_residual_bytes(const ProjectResidual& op) const {
  const Dims s(op);
  Layout forward, backward;
  ForwardScratch<T>(forward, concurrency(), s, bool(op.mixed.x));
  BackwardScratch<T>(backward, s);
  return {0, forward.used(), backward.used()};
}

template <class T>
void CpuBackend<T>::project_residual_forward(const ProjectResidual& op) {
  const Dims s(op);
  const i64 N = s.N, d = s.d, c = s.c;
  Layout layout(op.scratch.data);
  ForwardScratch<T> scratch(layout, concurrency(), s, bool(op.mixed.x));
  prepare(scratch.w, op.w);
  const auto product = [&](i64 first, i64 count, Start start) {
    scratch.w.multiply(count, op.a.as<T>() + first * c, c, start, op.out.as<T>() + first * d, d);
  };
  if (op.mixed.x) {
    const MixedRows<T> residual(op.mixed);
    const i64 length = op.out.shape[1], before = op.mixed.x.shape[1] - length;  // positions that out has, and lacks
    for_row_chunks(N, [&](i64 first, i64 count, int worker) {
      product(first, count, kFromZero);
      T *out = op.out.as<T>() + first * d, *row = scratch.row.of(worker);
      round(out, count * d);
      for (i64 i = 0; i < count; ++i) {
        residual.read(first + i + ((first + i) / length + 1) * before, row);
        PGOLF_SIMD
        for (i64 j = 0; j < d; ++j) out[i * d + j] += row[j];
      }
      round(out, count * d);
    });
    return;
  }
  for_row_chunks(N, [&](i64 first, i64 count, int) {
    T* out = op.out.as<T>() + first * d;
    if (op.x.data != op.out.data) {
      const T* x = op.x.as<T>() + first * d;
      PGOLF_SIMD
      for (i64 i = 0; i < count * d; ++i) out[i] = x[i];
    }
    product(first, count, kFromC);
    round(out, count * d);
  });
}

template <class T>
void CpuBackend<T>::project_residual_backward(const ProjectResidual& op, const ProjectResidualGrads& grads) {
  const Dims s(op);
  const i64 N = s.N, d = s.d, c = s.c;
  Layout layout(grads.scratch.data);
  BackwardScratch<T> scratch(layout, s);
  prepare(scratch.w, op.w);
  const T* dout = grads.dout.as<T>();
  const SquaredRelu& f = grads.activation;
  const T slope = T(2 * std::sqrt(f.scale)), below = T(-f.negative_slope);
  const unsigned char* const negative = f.negative.as<unsigned char>();
  for_row_chunks(N, [&](i64 first, i64 count, int) {
    T* da = grads.da.as<T>() + first * c;
    scratch.w.multiply(count, dout + first * d, d, kFromZero, da, c);
    if (f.scale > 0) {
      const T* h = op.a.as<T>() + first * c;
      PGOLF_SIMD
      for (i64 i = 0; i < count * c; ++i) da[i] *= slope * std::sqrt(h[i]);
      if (negative) {
        const unsigned char* bits = negative + first * c / 8;
        for (i64 i = 0; i < count * c; ++i) da[i] *= bits[i / 8] >> (i % 8) & 1 ? below : T(1);
      }
    }
    round(da, count * c);
  });
  if (grads.w) scratch.gradients.add(N, op.a.as<T>(), {{dout, d, d, grads.w.as<T>()}});
}

// No scratch is planned for it: every chunk of rows, taller than an operation's, packs b for itself.
template <class T>
void CpuBackend<T>::product(const TensorView& a, const TensorView& b, const TensorView& out) {
  const i64 n = b.shape[0], k = b.shape[1];
  constexpr i64 kRows = 512;
  const auto chunk = [&](i64 first, i64 count, int) {
    T* rows = out.as<T>() + first * n;
    gemm<T>(kPlain, kTransposed, count, n, k, a.as<T>() + first * k, k, b.as<T>(), k, kFromZero, rows, n);
    round(rows, count * n);
  };
  for_row_chunks(a.shape[0], chunk, kRows);
}

#define PGOLF_INSTANTIATE(T)                                                                                   \
  template OpBytes CpuBackend<T>::project_residual_bytes(const ProjectResidual&) const;                        \
  template void CpuBackend<T>::project_residual_forward(const ProjectResidual&);                               \
  template void CpuBackend<T>::project_residual_backward(const ProjectResidual&, const ProjectResidualGrads&); \
  template void CpuBackend<T>::product(const TensorView&, const TensorView&, const TensorView&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)

PGOLF_CPU_END
