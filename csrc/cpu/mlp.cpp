// Norm, the first MLP product and its activation. Its slope is projection.cpp's, from h: u itself is not kept.
#include <atomic>

#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

PGOLF_CPU_BEGIN
namespace {

struct Dims {
  i64 N, d, F;
  explicit Dims(const MlpUp& op) : N(op.x.shape[0] * op.x.shape[1]), d(op.x.shape[2]), F(op.w.shape[0]) {}
};

// What fp16 cannot hold becomes its largest number; counts how many.
template <class T>
void saturate_f16(T* h, i64 count, std::int64_t* saturated) {
  constexpr T kLargest = T(65504);
  std::int64_t found = 0;
  for (i64 i = 0; i < count; ++i) {
    if (!(h[i] > kLargest)) continue;
    h[i] = kLargest;
    ++found;
  }
  if (found && saturated) std::atomic_ref<std::int64_t>(*saturated).fetch_add(found, std::memory_order_relaxed);
}

// h: u → f(u). With a slope the signs of u are left in `negative`, bits from a whole byte on, unless it is null.
template <class T>
void square(T* h, i64 count, T scale, T slope, unsigned char* negative) {
  if (slope == 0) {
    PGOLF_SIMD
    for (i64 i = 0; i < count; ++i) {
      const T u = h[i] > 0 ? h[i] : T(0);
      h[i] = scale * (u * u);
    }
    return;
  }
  for (i64 first = 0; negative && first < count; first += 8) {
    unsigned bits = 0;
    for (i64 i = first; i < count && i < first + 8; ++i) bits |= unsigned(h[i] < 0) << (i - first);
    negative[first / 8] = static_cast<unsigned char>(bits);
  }
  PGOLF_SIMD
  for (i64 i = 0; i < count; ++i) {
    const T u = h[i] > 0 ? h[i] : slope * h[i];
    h[i] = scale * (u * u);
  }
}

template <class T>
struct ForwardScratch {
  PerWorker<T> normed;  // [kRowChunk, d]
  SharedRight<T> w;
  ForwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout, workers, kRowChunk * s.d), w(layout, s.N, kTransposed, s.F, s.d) {}
};

template <class T>
struct BackwardScratch {
  T* normed;             // [N, d]
  PerWorker<T> dnormed;  // [kRowChunk, d]
  SharedRight<T> w;
  WeightGradients<T> gradients;
  BackwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout.take<T>(s.N * s.d)),
        dnormed(layout, workers, kRowChunk * s.d),
        w(layout, s.N, kPlain, s.d, s.F),
        gradients(layout, s.N, s.d) {}
};

}  // namespace

template <class T>
OpBytes CpuBackend<T>::mlp_up_bytes(const MlpUp& op) const {
  const Dims s(op);
  Layout saved, forward, backward;
  saved.take<T>(s.N);  // rms factors
  ForwardScratch<T>(forward, concurrency(), s);
  BackwardScratch<T>(backward, concurrency(), s);
  return {saved.used(), forward.used(), backward.used()};
}

template <class T>
void CpuBackend<T>::mlp_up_forward(const MlpUp& op) {
  const Dims s(op);
  Layout scratch_layout(op.scratch.data);
  ForwardScratch<T> scratch(scratch_layout, concurrency(), s);
  prepare(scratch.w, op.w);
  T* factor = op.saved.as<T>();
  const T scale = T(op.activation.scale), slope = T(op.activation.negative_slope);
  unsigned char* const negative = op.activation.negative.as<unsigned char>();
  static_assert(kRowChunk % 8 == 0, "a chunk's signs begin with a byte");
  for_row_chunks(s.N, [&](i64 first, i64 count, int worker) {
    T *normed = scratch.normed.of(worker), *h = op.h.as<T>() + first * s.F;
    for (i64 i = 0; i < count; ++i)
      factor[first + i] = rms_row(op.x.as<T>() + (first + i) * s.d, s.d, normed + i * s.d, T(op.norm_scale));
    round(normed, count * s.d);
    scratch.w.multiply(count, normed, s.d, kFromZero, h, s.F);
    square(h, count * s.F, scale, slope, negative ? negative + first * s.F / 8 : nullptr);
    if (rounding_ == Rounding::f16) saturate_f16(h, count * s.F, op.saturated);
    round(h, count * s.F);
  });
}

template <class T>
void CpuBackend<T>::mlp_up_backward(const MlpUp& op, const MlpUpGrads& grads) {
  const Dims s(op);
  Layout scratch_layout(grads.scratch.data);
  BackwardScratch<T> scratch(scratch_layout, concurrency(), s);
  prepare(scratch.w, op.w);
  const T* factor = op.saved.as<T>();
  for_row_chunks(s.N, [&](i64 first, i64 count, int worker) {
    const T* du = grads.du.as<T>() + first * s.F;
    T* dnormed = scratch.dnormed.of(worker);
    scratch.w.multiply(count, du, s.F, kFromZero, dnormed, s.d);
    round(dnormed, count * s.d);
    for (i64 i = 0; i < count; ++i) {
      const T* x = op.x.as<T>() + (first + i) * s.d;
      T* normed = scratch.normed + (first + i) * s.d;
      const T f = factor[first + i];
      PGOLF_SIMD
      for (i64 j = 0; j < s.d; ++j) normed[j] = x[j] * f;
      rms_row_backward<true>(normed, f, dnormed + i * s.d, s.d, grads.dx.as<T>() + (first + i) * s.d, T(op.norm_scale));
      round(normed, s.d);
    }
    round(grads.dx.as<T>() + first * s.d, count * s.d);
  });
  if (grads.w) scratch.gradients.add(s.N, scratch.normed, {{grads.du.as<T>(), s.F, s.F, grads.w.as<T>()}});
}

#define PGOLF_INSTANTIATE(T)                                        \
  template OpBytes CpuBackend<T>::mlp_up_bytes(const MlpUp&) const; \
  template void CpuBackend<T>::mlp_up_forward(const MlpUp&);        \
  template void CpuBackend<T>::mlp_up_backward(const MlpUp&, const MlpUpGrads&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
