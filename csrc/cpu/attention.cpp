// Causal attention with grouped queries. A block of queries sees all its keys at once: the scores of
// kQueryBlock × T numbers stay in the second-level cache, and a row's softmax is taken whole.
#include <limits>

#include "cpu/cpu_backend.h"
#include "cpu/heads.h"
#include "cpu/math.h"
#include "cpu/rows.h"

PGOLF_CPU_BEGIN
namespace {

inline constexpr i64 kQueryBlock = 64;

// Products of a forward below which this thread has done them before another has woken: some 50 µs.
inline constexpr i64 kWorthWaking = i64{1} << 20;

template <class T>
struct Dims {
  i64 B, L, H, K, D;  // L: sequence length
  i64 first;          // position that has a query
  T root;             // 1/√D
  explicit Dims(const Attention& op)
      : B(op.q.shape[0]),
        L(op.k.shape[1]),
        H(op.q.shape[2]),
        K(op.k.shape[2]),
        D(op.q.shape[3]),
        first(L - op.q.shape[1]),
        root(T(1) / std::sqrt(T(D))) {}
  i64 queries() const { return L - first; }
  i64 blocks() const { return chunks_of(queries(), kQueryBlock); }
};

template <class T>
struct ForwardScratch {
  PerWorker<T> scores;  // [queries of a block, L]
  ForwardScratch(Layout& layout, int workers, const Dims<T>& s)
      : scores(layout, workers, (s.queries() < kQueryBlock ? s.queries() : kQueryBlock) * s.L) {}
};

template <class T>
struct BackwardScratch {
  PerWorker<T> p, dp;  // [kQueryBlock, L] probabilities; their gradient, then the scores'
  T* dgain;            // [B, H]
  BackwardScratch(Layout& layout, int workers, const Dims<T>& s)
      : p(layout, workers, kQueryBlock * s.L),
        dp(layout, workers, kQueryBlock * s.L),
        dgain(layout.take<T>(s.B * s.H)) {}
};

// scores[r][0 … keys) = q·kᵀ for `rows` queries, the last of which is that of position keys − 1
template <class T>
void raw_scores(const Dims<T>& s, const T* q, const T* k, i64 rows, i64 keys, T* scores) {
  gemm<T>(kPlain, kTransposed, rows, keys, s.D, q, s.H * s.D, k, s.K * s.D, kFromZero, scores, keys);
}

}  // namespace

template <class T>
OpBytes CpuBackend<T>::attention_bytes(const Attention& op) const {
  const Dims<T> s(op);
  Layout saved, forward, backward;
  saved.take<T>(s.B * s.H * s.queries());  // log-sum-exp of the scaled scores
  ForwardScratch<T>(forward, concurrency(), s);
  BackwardScratch<T>(backward, concurrency(), s);
  return {saved.used(), forward.used(), backward.used()};
}

template <class T>
void CpuBackend<T>::attention_forward(const Attention& op) {
  const Dims<T> s(op);
  Layout scratch_layout(op.scratch.data);
  const ForwardScratch<T> scratch(scratch_layout, concurrency(), s);
  const T* gain = op.gain.as<T>();
  T* lse = op.saved.as<T>();

  // The last blocks of a sequence are the longest: they go first.
  const auto forward = [&](i64 task) {
    const i64 block = s.blocks() - 1 - task / (s.B * s.H), b = task % (s.B * s.H) / s.H, h = task % s.H;
    const i64 q0 = block * kQueryBlock, left = s.queries() - q0, rows = left < kQueryBlock ? left : kQueryBlock;
    const i64 keys = s.first + q0 + rows;
    const i64 kv = h * s.K / s.H;
    const T* k = op.k.as<T>() + (b * s.L * s.K + kv) * s.D;
    const T* v = op.v.as<T>() + (b * s.L * s.K + kv) * s.D;
    const i64 at = ((b * s.queries() + q0) * s.H + h) * s.D;
    T* scores = scratch.scores.of(worker_index());
    raw_scores(s, op.q.as<T>() + at, k, rows, keys, scores);

    T inverse_sum[kQueryBlock];
    const T scale = gain[h] * s.root;
    for (i64 r = 0; r < rows; ++r) {
      T* row = scores + r * keys;
      const i64 visible = s.first + q0 + r + 1;
      T top = -std::numeric_limits<T>::infinity();
      PGOLF_SIMD_MAX(top)
      for (i64 j = 0; j < visible; ++j) {
        row[j] *= scale;
        top = row[j] > top ? row[j] : top;
      }
      T sum = 0;
      PGOLF_SIMD_SUM(sum)
      for (i64 j = 0; j < visible; ++j) {
        row[j] = fast_exp(row[j] - top);
        sum += row[j];
      }
      for (i64 j = visible; j < keys; ++j) row[j] = 0;
      round(row, visible);
      inverse_sum[r] = T(1) / sum;
      lse[(b * s.H + h) * s.queries() + q0 + r] = top + std::log(sum);
    }
    T* o = op.o.as<T>() + at;
    gemm<T>(kPlain, kPlain, rows, s.D, keys, scores, keys, v, s.K * s.D, kFromZero, o, s.H * s.D);
    for (i64 r = 0; r < rows; ++r) {
      for (i64 j = 0; j < s.D; ++j) o[r * s.H * s.D + j] *= inverse_sum[r];
      round(o + r * s.H * s.D, s.D);
    }
  };
  const i64 tasks = s.B * s.H * s.blocks();
  if (s.B * s.H * s.queries() * s.L * s.D * 2 >= kWorthWaking) return parallel_for(tasks, forward);
  for (i64 task = 0; task < tasks; ++task) forward(task);
}

template <class T>
void CpuBackend<T>::attention_backward(const Attention& op, const AttentionGrads& grads) {
  const Dims<T> s(op);
  Layout scratch_layout(grads.scratch.data);
  const BackwardScratch<T> scratch(scratch_layout, concurrency(), s);
  const T *gain = op.gain.as<T>(), *lse = op.saved.as<T>();
  const i64 q_stride = s.H * s.D, k_stride = s.K * s.D, stride = q_stride + 2 * k_stride, group = s.H / s.K;
  Layout norms_layout(grads.norms.saved.data);
  const HeadFactors<T> factors(norms_layout, s.B * s.L, s.B * s.L * s.H, s.B * s.L * s.K);

  // One task owns a key/value head of a sequence, so dk and dv are summed in one order.
  parallel_for(s.B * s.K, [&](i64 task) {
    const i64 b = task / s.K, kv = task % s.K;
    const i64 kv_at = (b * s.L * s.K + kv) * s.D;
    const T *k = op.k.as<T>() + kv_at, *v = op.v.as<T>() + kv_at;
    T* const of_sequence = grads.dqkv.as<T>() + b * s.L * stride;
    T *dk = of_sequence + (s.H + kv) * s.D, *dv = dk + k_stride;
    T *p = scratch.p.of(worker_index()), *dp = scratch.dp.of(worker_index());
    for (i64 t = 0; t < s.L; ++t)
      for (i64 j = 0; j < s.D; ++j) dk[t * stride + j] = dv[t * stride + j] = 0;

    for (i64 h = kv * group; h < (kv + 1) * group; ++h) {
      const T scale = gain[h] * s.root;
      T dgain = 0;
      for (i64 q0 = 0; q0 < s.L; q0 += kQueryBlock) {
        const i64 rows = s.L - q0 < kQueryBlock ? s.L - q0 : kQueryBlock, keys = q0 + rows;
        const i64 at = ((b * s.L + q0) * s.H + h) * s.D;
        const T *q = op.q.as<T>() + at, *o = op.o.as<T>() + at, *d_o = grads.d_o.as<T>() + at;
        T* dq = of_sequence + q0 * stride + h * s.D;
        raw_scores(s, q, k, rows, keys, p);
        gemm<T>(kPlain, kTransposed, rows, keys, s.D, d_o, q_stride, v, k_stride, kFromZero, dp, keys);
        for (i64 r = 0; r < rows; ++r) {
          T *p_row = p + r * keys, *dp_row = dp + r * keys;
          const i64 visible = q0 + r + 1;
          const T log_sum = lse[(b * s.H + h) * s.L + q0 + r];
          const T delta = dot(d_o + r * q_stride, o + r * q_stride, s.D);
          PGOLF_SIMD
          for (i64 j = 0; j < visible; ++j) {
            p_row[j] = fast_exp(p_row[j] * scale - log_sum);
            dp_row[j] = p_row[j] * (dp_row[j] - delta);
          }
          for (i64 j = visible; j < keys; ++j) p_row[j] = dp_row[j] = 0;
          round(p_row, visible);
          round(dp_row, visible);
        }
        gemm_blocks<T>(kTransposed, kPlain, keys, s.D, rows, T(1), p, keys, d_o, q_stride, dv, stride);
        gemm_blocks<T>(kTransposed, kPlain, keys, s.D, rows, scale, dp, keys, q, q_stride, dk, stride);
        gemm<T>(kPlain, kPlain, rows, s.D, keys, dp, keys, k, k_stride, kFromZero, dq, stride);
        // dq is the gradient at scale·q so far.
        for (i64 r = 0; r < rows; ++r) {
          dgain += s.root * dot(dq + r * stride, q + r * q_stride, s.D);
          for (i64 j = 0; j < s.D; ++j) dq[r * stride + j] *= scale;
        }
      }
      scratch.dgain[b * s.H + h] = dgain;
    }
    for (i64 t = 0; t < s.L; ++t) {
      T *dq = of_sequence + t * stride + kv * group * s.D, *own_dk = dk + t * stride;
      if (grads.norms.saved) {
        const T *cos = grads.norms.cos.as<T>() + t * (s.D / 2), *sin = grads.norms.sin.as<T>() + t * (s.D / 2);
        const i64 R = grads.norms.rope_dims ? grads.norms.rope_dims : s.D;
        const i64 head = (b * s.L + t) * s.H + kv * group, kv_head = (b * s.L + t) * s.K + kv;
        norm_rotate_backward(op.q.as<T>() + head * s.D, dq, group, s.D, R, cos, sin, factors.q + head);
        norm_rotate_backward(op.k.as<T>() + kv_head * s.D, own_dk, 1, s.D, R, cos, sin, factors.k + kv_head);
      }
      round(dq, group * s.D);
      round(own_dk, s.D);
      round(dv + t * stride, s.D);
    }
  });
  if (!grads.gain) return;
  for (i64 b = 0; b < s.B; ++b)
    for (i64 h = 0; h < s.H; ++h) grads.gain.as<T>()[h] += scratch.dgain[b * s.H + h];
}

#define PGOLF_INSTANTIATE(T)                                               \
  template OpBytes CpuBackend<T>::attention_bytes(const Attention&) const; \
  template void CpuBackend<T>::attention_forward(const Attention&);        \
  template void CpuBackend<T>::attention_backward(const Attention&, const AttentionGrads&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
