// Final norm, output product, softcap and cross-entropy, in pieces: the logits of a whole batch never exist.
#include "cpu/adapters.h"
#include "cpu/cpu_backend.h"
#include "cpu/math.h"

PGOLF_CPU_BEGIN
namespace {

struct Dims {
  i64 B, T, d, V, first, rows, rank;  // rows: positions computed, B·(T − first)
  explicit Dims(const Head& op)
      : B(op.x.shape[0]),
        T(op.x.shape[1]),
        d(op.x.shape[2]),
        V(op.w.shape[0]),
        first(op.first),
        rows(B * (T - first)),
        rank(op.adapters ? op.rank : 0) {}
  i64 token(i64 row) const { return row / (T - first) * T + first + row % (T - first); }
  i64 period() const { return rank ? T - first : rows; }
  RowCut cut() const { return {rows, period(), kRowChunk}; }
  // Rows whose logits are kept for the weight gradient: one of its blocks of sums, or two where those are at most 4 Mi
  // numbers. With adapters either whole sequences or a part of one.
  RowCut blocks() const {
    const i64 kept = V <= 4096 ? 2 * kSumBlock : kSumBlock;
    return period() < kept ? RowCut{rows, rows, kept / period() * period()} : RowCut{rows, period(), kept};
  }
  template <class U>
  Adapters<U, 1> adapters(const TensorView& of) const {
    return {of.as<U>(), rank, d, {V}};
  }
};

template <class T>
struct ForwardScratch {
  PerWorker<T> normed, logits, u;  // [kRowChunk, d], [kRowChunk, V], [kRowChunk, rank]
  SharedRight<T> w;
  ForwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout, workers, kRowChunk * s.d),
        logits(layout, workers, kRowChunk * s.V),
        u(layout, workers, kRowChunk * s.rank),
        w(layout, s.rows, kTransposed, s.V, s.d) {}
};

template <class T>
struct BackwardScratch {
  T *normed, *logits;    // [block, d], [block, V]
  T *u, *du;             // [block, rank]
  PerWorker<T> dnormed;  // [kRowChunk, d]
  SharedRight<T> w, w_back;
  WeightGradients<T> gradients;
  BackwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout.take<T>(s.blocks().chunk * s.d)),
        logits(layout.take<T>(s.blocks().chunk * s.V)),
        u(layout.take<T>(s.blocks().chunk * s.rank)),
        du(layout.take<T>(s.blocks().chunk * s.rank)),
        dnormed(layout, workers, kRowChunk * s.d),
        w(layout, s.rows, kTransposed, s.V, s.d),
        w_back(layout, s.rows, kPlain, s.d, s.V),
        gradients(layout, s.blocks().chunk, s.d) {}
};

// Logits of the computed rows [first, first + count); factors may be null.
template <class T>
void chunk_logits(const Head& op, const Dims& s, const SharedRight<T>& w, Rounding rounding, i64 first, i64 count,
                  T* normed, T* factors, T* u, T* logits) {
  for (i64 i = 0; i < count; ++i) {
    const T f = rms_row(op.x.as<T>() + s.token(first + i) * s.d, s.d, normed + i * s.d);
    if (factors) factors[i] = f;
  }
  round_values(rounding, normed, count * s.d);
  w.multiply(count, normed, s.d, kFromZero, logits, s.V);
  if (const auto adapters = s.adapters<T>(op.adapters); adapters.numbers) {
    adapters.down(first / s.period(), count, normed, u);
    round_values(rounding, u, count * s.rank);
    adapters.up(first / s.period(), 0, count, u, logits);
  }
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
OpBytes CpuBackend<T>::head_bytes(const Head& op) const {
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
  ForwardScratch<T> scratch(layout, concurrency(), s);
  prepare(scratch.w, op.w);
  for_row_chunks(s.cut(), [&](i64 first, i64 count, int worker) {
    chunk_logits<T>(op, s, scratch.w, rounding_, first, count, scratch.normed.of(worker), nullptr, scratch.u.of(worker),
                    op.logits.as<T>() + first * s.V);
  });
}

template <class T>
void CpuBackend<T>::head_loss(const Head& op) {
  const Dims s(op);
  Layout layout(op.scratch.data);
  ForwardScratch<T> scratch(layout, concurrency(), s);
  prepare(scratch.w, op.w);
  const auto* targets = op.targets.as<std::int32_t>();
  for_row_chunks(s.cut(), [&](i64 first, i64 count, int worker) {
    T* logits = scratch.logits.of(worker);
    chunk_logits<T>(op, s, scratch.w, rounding_, first, count, scratch.normed.of(worker), nullptr, scratch.u.of(worker),
                    logits);
    for (i64 i = 0; i < count; ++i)
      op.losses.as<T>()[first + i] = log_sum_exp(logits + i * s.V, s.V) - logits[i * s.V + targets[s.token(first + i)]];
  });
}

template <class T>
void CpuBackend<T>::head_loss_backward(const Head& op, const HeadGrads& grads) {
  const Dims s(op);
  Layout layout(grads.scratch.data);
  BackwardScratch<T> scratch(layout, concurrency(), s);
  prepare<T, 2>({&scratch.w, &scratch.w_back}, {&op.w, &op.w});
  const auto* targets = op.targets.as<std::int32_t>();
  const T loss_scale = T(grads.loss_scale * (grads.multiplier ? *grads.multiplier : 1.0)),
          inverse_cap = T(1) / T(op.softcap);
  const T* weights = grads.weights.as<T>();
  const auto adapters = s.adapters<T>(op.adapters), dadapters = s.adapters<T>(grads.adapters);
  if (s.first) zero(grads.dx);

  const RowCut blocks = s.blocks();
  for (i64 index = 0; index < blocks.chunks(); ++index) {
    const i64 start = blocks.first(index), rows = blocks.count(start);
    const RowCut cut{rows, rows < s.period() ? rows : s.period(), kRowChunk};
    for_row_chunks(cut, [&](i64 offset, i64 count, int worker) {
      const i64 first = start + offset;
      T *normed = scratch.normed + offset * s.d, *logits = scratch.logits + offset * s.V;
      T *u = scratch.u + offset * s.rank, *du = scratch.du + offset * s.rank;
      T *dnormed = scratch.dnormed.of(worker), factors[kRowChunk];
      chunk_logits<T>(op, s, scratch.w, rounding_, first, count, normed, factors, u, logits);
      for (i64 i = 0; i < count; ++i) {
        T* row = logits + i * s.V;  // becomes the gradient before the softcap
        const i64 target = targets[s.token(first + i)];
        const T lse = log_sum_exp(row, s.V), at_target = row[target];
        op.losses.as<T>()[first + i] = lse - at_target;
        const T scale = weights ? loss_scale * weights[first + i] : loss_scale;
        const auto slope = [&](T logit) { return T(1) - (logit * inverse_cap) * (logit * inverse_cap); };
        PGOLF_SIMD
        for (i64 j = 0; j < s.V; ++j) row[j] = scale * fast_exp(row[j] - lse) * slope(row[j]);
        row[target] -= scale * slope(at_target);
        round(row, s.V);
      }
      scratch.w_back.multiply(count, logits, s.V, kFromZero, dnormed, s.d);
      if (adapters.numbers) {
        adapters.up_backward(first / s.period(), 0, count, logits, s.V, du);
        round(du, count * s.rank);
        adapters.down_backward(first / s.period(), count, du, dnormed);
      }
      round(dnormed, count * s.d);
      for (i64 i = 0; i < count; ++i) {
        T* dx = grads.dx.as<T>() + s.token(first + i) * s.d;
        rms_row_backward<false>(normed + i * s.d, factors[i], dnormed + i * s.d, s.d, dx);
        round(dx, s.d);
      }
    });
    if (dadapters.numbers)
      parallel_for(rows / cut.period, [&](i64 part) {
        const i64 offset = part * cut.period, sequence = (start + offset) / s.period();
        if ((start + offset) % s.period() == 0) dadapters.clear(sequence);  // a long one lies in several blocks
        dadapters.a_gradient(sequence, cut.period, scratch.du + offset * s.rank, scratch.normed + offset * s.d);
        dadapters.b_gradient(sequence, 0, cut.period, scratch.logits + offset * s.V, s.V, scratch.u + offset * s.rank);
      });
    if (grads.w) scratch.gradients.add(rows, scratch.normed, {{scratch.logits, s.V, s.V, grads.w.as<T>()}});
  }
}

#define PGOLF_INSTANTIATE(T)                                     \
  template OpBytes CpuBackend<T>::head_bytes(const Head&) const; \
  template void CpuBackend<T>::head_logits(const Head&);         \
  template void CpuBackend<T>::head_loss(const Head&);           \
  template void CpuBackend<T>::head_loss_backward(const Head&, const HeadGrads&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
