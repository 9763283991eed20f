// Final norm, output product, softcap and cross-entropy, in pieces: the logits of a whole batch never exist.
#include "cpu/cpu_backend.h"
#include "cpu/math.h"
#include "cpu/rows.h"

PGOLF_CPU_BEGIN
namespace {

inline constexpr i64 kHeadChunk = 256;  // rows done by one task

struct Dims {
  i64 B, T, d, V, first, rows;  // rows: positions computed, B·(T − first)
  explicit Dims(const Head& op)
      : B(op.x.shape[0]),
        T(op.x.shape[1]),
        d(op.x.shape[2]),
        V(op.w.shape[0]),
        first(op.first),
        rows(B * (T - first)) {}
  i64 token(i64 row) const { return row / (T - first) * T + first + row % (T - first); }
  // Rows whose logits are kept for the weight gradient: at most 1,024, about 4 Mi numbers.
  i64 block() const {
    const i64 wanted = (i64{4} << 20) / V / kHeadChunk * kHeadChunk;
    return wanted < kHeadChunk ? kHeadChunk : wanted > 1024 ? 1024 : wanted;
  }
};

template <class T>
struct ForwardScratch {
  PerWorker<T> normed, logits;  // [kHeadChunk, d], [kHeadChunk, V]
  ForwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout, workers, kHeadChunk * s.d), logits(layout, workers, kHeadChunk * s.V) {}
};

template <class T>
struct BackwardScratch {
  T *normed, *logits;    // [block, d], [block, V]
  PerWorker<T> dnormed;  // [kHeadChunk, d]
  BackwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout.take<T>(s.block() * s.d)),
        logits(layout.take<T>(s.block() * s.V)),
        dnormed(layout, workers, kHeadChunk * s.d) {}
};

// Logits of the computed rows [first, first + count); factors may be null.
template <class T>
void chunk_logits(const Head& op, const Dims& s, Rounding rounding, i64 first, i64 count, T* normed, T* factors,
                  T* logits) {
  for (i64 i = 0; i < count; ++i) {
    const T f = rms_row(op.x.as<T>() + s.token(first + i) * s.d, s.d, normed + i * s.d);
    if (factors) factors[i] = f;
  }
  round_values(rounding, normed, count * s.d);
  gemm<T>(kPlain, kTransposed, count, s.V, s.d, T(1), normed, s.d, op.w.as<T>(), s.d, T(0), logits, s.V);
  const T cap = T(op.softcap), inverse = T(1) / cap;
  PGOLF_SIMD
  for (i64 i = 0; i < count * s.V; ++i) logits[i] = cap * fast_tanh(logits[i] * inverse);
}

template <class T>
T log_sum_exp(const T* logits, i64 V) {
  T top = logits[0];
  PGOLF_SIMD_MAX(top)
  for (i64 j = 1; j < V; ++j) top = logits[j] > top ? logits[j] : top;
  T sum = 0;
  PGOLF_SIMD_SUM(sum)
  for (i64 j = 0; j < V; ++j) sum += fast_exp(logits[j] - top);
  return top + std::log(sum);
}

}  // namespace

template <class T>
OpBytes CpuBackend<T>::bytes(const Head& op) const {
  const Dims s(op);
  Layout forward, backward;
  ForwardScratch<T>(forward, concurrency(), s);
  BackwardScratch<T>(backward, concurrency(), s);
  return {0, forward.used(), backward.used()};
}

template <class T>
void CpuBackend<T>::head_logits(const Head& op) {
  const Dims s(op);
  Layout layout(op.scratch.data);
  const ForwardScratch<T> scratch(layout, concurrency(), s);
  for_row_chunks(
      s.rows,
      [&](i64 first, i64 count, int worker) {
        chunk_logits<T>(op, s, rounding_, first, count, scratch.normed.of(worker), nullptr,
                        op.logits.as<T>() + first * s.V);
      },
      kHeadChunk);
}

template <class T>
void CpuBackend<T>::head_loss(const Head& op) {
  const Dims s(op);
  Layout layout(op.scratch.data);
  const ForwardScratch<T> scratch(layout, concurrency(), s);
  const auto* targets = op.targets.as<std::int32_t>();
  for_row_chunks(
      s.rows,
      [&](i64 first, i64 count, int worker) {
        T* logits = scratch.logits.of(worker);
        chunk_logits<T>(op, s, rounding_, first, count, scratch.normed.of(worker), nullptr, logits);
        for (i64 i = 0; i < count; ++i)
          op.losses.as<T>()[first + i] =
              log_sum_exp(logits + i * s.V, s.V) - logits[i * s.V + targets[s.token(first + i)]];
      },
      kHeadChunk);
}

template <class T>
void CpuBackend<T>::head_loss_backward(const Head& op, const HeadGrads& grads) {
  const Dims s(op);
  Layout layout(grads.scratch.data);
  const BackwardScratch<T> scratch(layout, concurrency(), s);
  const auto* targets = op.targets.as<std::int32_t>();
  const T scale = T(grads.loss_scale * (grads.multiplier ? *grads.multiplier : 1.0)),
          inverse_cap = T(1) / T(op.softcap);

  for (i64 start = 0; start < s.rows; start += s.block()) {
    const i64 rows = s.rows - start < s.block() ? s.rows - start : s.block();
    for_row_chunks(
        rows,
        [&](i64 offset, i64 count, int worker) {
          const i64 first = start + offset;
          T *normed = scratch.normed + offset * s.d, *logits = scratch.logits + offset * s.V;
          T *dnormed = scratch.dnormed.of(worker), factors[kHeadChunk];
          chunk_logits<T>(op, s, rounding_, first, count, normed, factors, logits);
          for (i64 i = 0; i < count; ++i) {
            T* row = logits + i * s.V;  // becomes the gradient before the softcap
            const i64 target = targets[first + i];
            const T lse = log_sum_exp(row, s.V), at_target = row[target];
            op.losses.as<T>()[first + i] = lse - at_target;
            const auto slope = [&](T logit) { return T(1) - (logit * inverse_cap) * (logit * inverse_cap); };
            PGOLF_SIMD
            for (i64 j = 0; j < s.V; ++j) row[j] = scale * fast_exp(row[j] - lse) * slope(row[j]);
            row[target] -= scale * slope(at_target);
            round(row, s.V);
          }
          gemm<T>(kPlain, kPlain, count, s.d, s.V, T(1), logits, s.V, op.w.as<T>(), s.d, T(0), dnormed, s.d);
          round(dnormed, count * s.d);
          for (i64 i = 0; i < count; ++i)
            rms_row_backward<false>(normed + i * s.d, factors[i], dnormed + i * s.d, s.d,
                                    grads.dx.as<T>() + (first + i) * s.d);
          round(grads.dx.as<T>() + first * s.d, count * s.d);
        },
        kHeadChunk);
    gemm_weight_gradients<T>(rows, s.d, T(1), scratch.normed, {{scratch.logits, s.V, grads.w.as<T>()}});
  }
}

#define PGOLF_INSTANTIATE(T)                                \
  template OpBytes CpuBackend<T>::bytes(const Head&) const; \
  template void CpuBackend<T>::head_logits(const Head&);    \
  template void CpuBackend<T>::head_loss(const Head&);      \
  template void CpuBackend<T>::head_loss_backward(const Head&, const HeadGrads&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
