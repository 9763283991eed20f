// Mixed input, norm, the three projections, head norms and RoPE.
#include "cpu/adapters.h"
#include "cpu/cpu_backend.h"
#include "cpu/heads.h"

PGOLF_CPU_BEGIN
namespace {

struct Dims {
  i64 N, T, d, H, K, D, R;
  i64 first;  // position that has a query
  i64 rank;   // of adapters; 0: none
  explicit Dims(const Qkv& op)
      : N(op.k.shape[0] * op.k.shape[1]),
        T(op.k.shape[1]),
        d(op.in.x.shape[2]),
        H(op.q.shape[2]),
        K(op.k.shape[2]),
        D(op.q.shape[3]),
        R(op.rope_dims ? op.rope_dims : D),
        first(T - op.q.shape[1]),
        rank(op.adapters ? op.rank : 0) {}
  i64 query_rows() const { return N / T * (T - first); }
  RowCut cut() const { return {N, rank ? T : N}; }
  template <class U>
  Adapters<U, 2> adapters(const TensorView& of) const {
    return {of.as<U>(), rank, d, {H * D, K * D}};
  }
};

template <class T>
struct Saved : HeadFactors<T> {
  T* u;  // [N, 2·rank]
  Saved(Layout& layout, const Dims& s)
      : HeadFactors<T>(layout, s.N, s.query_rows() * s.H, s.N * s.K), u(layout.take<T>(s.N * 2 * s.rank)) {}
};

template <class T>
struct ForwardScratch {
  PerWorker<T> normed;  // [kRowChunk, d]
  SharedRight<T> wq, wk, wv;
  ForwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout, workers, kRowChunk * s.d),
        wq(layout, s.N, kTransposed, s.H * s.D, s.d),
        wk(layout, s.N, kTransposed, s.K * s.D, s.d),
        wv(layout, s.N, kTransposed, s.K * s.D, s.d) {}
};

template <class T>
struct BackwardScratch {
  T* normed;              // [N, d]
  T* du;                  // [N, 2·rank]
  PerWorker<T> dnormed;   // [kRowChunk, d]
  ColumnSums<T> vectors;  // mix row 0, mix row 1, skip weight
  SharedRight<T> wq, wk, wv;
  WeightGradients<T> gradients;
  BackwardScratch(Layout& layout, int workers, const Dims& s)
      : normed(layout.take<T>(s.N * s.d)),
        du(layout.take<T>(s.N * 2 * s.rank)),
        dnormed(layout, workers, kRowChunk * s.d),
        vectors(layout, s.cut(), 3 * s.d),
        wq(layout, s.N, kPlain, s.d, s.H * s.D),
        wk(layout, s.N, kPlain, s.d, s.K * s.D),
        wv(layout, s.N, kPlain, s.d, s.K * s.D),
        gradients(layout, s.N, s.d) {}
};

// body(token, rows, to) for the runs of tokens in [first, first + count) that have queries, which are rows `to` … of q.
template <class F>
PGOLF_INLINE void for_query_runs(const Dims& s, i64 first, i64 count, F&& body) {
  if (s.first == 0) return body(first, count, first);
  for (i64 token = first; token < first + count;) {
    const i64 sequence = token / s.T, next = (sequence + 1) * s.T, end = next < first + count ? next : first + count;
    const i64 least = sequence * s.T + s.first, from = token < least ? least : token;
    if (from < end) body(from, end - from, from - (sequence + 1) * s.first);
    token = end;
  }
}

}  // namespace

template <class T>
OpBytes CpuBackend<T>::qkv_bytes(const Qkv& op) const {
  const Dims s(op);
  Layout saved, forward, backward;
  Saved<T>(saved, s);
  ForwardScratch<T>(forward, concurrency(), s);
  BackwardScratch<T>(backward, concurrency(), s);
  return {saved.used(), forward.used(), backward.used()};
}

template <class T>
void CpuBackend<T>::qkv_forward(const Qkv& op) {
  const Dims s(op);
  Layout saved_layout(op.saved.data), scratch_layout(op.scratch.data);
  const Saved<T> saved(saved_layout, s);
  ForwardScratch<T> scratch(scratch_layout, concurrency(), s);
  prepare<T, 3>({&scratch.wq, &scratch.wk, &scratch.wv}, {&op.wq, &op.wk, &op.wv});
  const MixedRows<T> input(op.in);
  const T *cos = op.cos.as<T>(), *sin = op.sin.as<T>();
  const auto adapters = s.adapters<T>(op.adapters);

  for_row_chunks(s.cut(), [&](i64 first, i64 count, int worker) {
    T* normed = scratch.normed.of(worker);
    for (i64 i = 0; i < count; ++i) {
      input.read(first + i, normed + i * s.d);
      saved.input[first + i] = rms_row(normed + i * s.d, s.d, normed + i * s.d, T(op.norm_scale));
    }
    round(normed, count * s.d);
    // out [rows, width] = the rows of normed from that of `token` on · wᵀ
    const auto project = [&](i64 token, i64 rows, const SharedRight<T>& w, T* out, i64 width) {
      w.multiply(rows, normed + (token - first) * s.d, s.d, kFromZero, out, width);
      round(out, rows * width);
    };
    const auto rotate = [&](i64 token, i64 rows, T* x, i64 heads, T* factors) {
      for (i64 i = 0; i < rows; ++i) {
        const i64 angle = (token + i) % s.T * (s.D / 2);
        norm_rotate(x + i * heads * s.D, heads, s.D, s.R, cos + angle, sin + angle, factors + i * heads);
      }
      round(x, rows * heads * s.D);
    };
    T *k = op.k.as<T>() + first * s.K * s.D, *v = op.v.as<T>() + first * s.K * s.D;
    T* u = saved.u + first * adapters.width();
    project(first, count, scratch.wk, k, s.K * s.D);
    project(first, count, scratch.wv, v, s.K * s.D);
    if (adapters.numbers) {
      adapters.down(first / s.T, count, normed, u);
      round(u, count * adapters.width());
      adapters.up(first / s.T, 1, count, u, v);
      round(v, count * s.K * s.D);
    }
    rotate(first, count, k, s.K, saved.k + first * s.K);
    for_query_runs(s, first, count, [&](i64 token, i64 rows, i64 to) {
      T* q = op.q.as<T>() + to * s.H * s.D;
      project(token, rows, scratch.wq, q, s.H * s.D);
      if (adapters.numbers) adapters.up(first / s.T, 0, rows, u + (token - first) * adapters.width(), q);
      rotate(token, rows, q, s.H, saved.q + to * s.H);
    });
  });
}

template <class T>
void CpuBackend<T>::heads_backward(const Qkv& op, const TensorView& dqkv) {
  const Dims s(op);
  Layout layout(op.saved.data);
  const Saved<T> saved(layout, s);
  const i64 width = (s.H + 2 * s.K) * s.D;
  for_row_chunks(s.N, [&](i64 first, i64 count, int) {
    for (i64 row = first; row < first + count; ++row) {
      const i64 angle = row % s.T * (s.D / 2);
      const T *cos = op.cos.as<T>() + angle, *sin = op.sin.as<T>() + angle;
      T* const own = dqkv.as<T>() + row * width;
      norm_rotate_backward(op.q.as<T>() + row * s.H * s.D, own, s.H, s.D, s.R, cos, sin, saved.q + row * s.H);
      norm_rotate_backward(op.k.as<T>() + row * s.K * s.D, own + s.H * s.D, s.K, s.D, s.R, cos, sin,
                           saved.k + row * s.K);
      round(own, (s.H + s.K) * s.D);
    }
  });
}

template <class T>
void CpuBackend<T>::qkv_backward(const Qkv& op, const QkvGrads& grads) {
  const Dims s(op);
  Layout saved_layout(op.saved.data), scratch_layout(grads.scratch.data);
  const Saved<T> saved(saved_layout, s);
  BackwardScratch<T> scratch(scratch_layout, concurrency(), s);
  const MixedRows<T> input(op.in);
  const T* dqkv = grads.dqkv.as<T>();
  const i64 width = (s.H + 2 * s.K) * s.D, from_k = s.H * s.D, from_v = (s.H + s.K) * s.D;  // of a row of dqkv
  T *dx = grads.dx.as<T>(), *dx0 = grads.dx0.as<T>(), *dskip = grads.dskip.as<T>();
  const T* pending = grads.pending.as<T>();
  const i64 d = s.d;
  const auto adapters = s.adapters<T>(op.adapters), dadapters = s.adapters<T>(grads.adapters);
  const auto normed_again = [&](i64 row) {
    T* normed = scratch.normed + row * d;
    input.read(row, normed);
    for (i64 j = 0; j < d; ++j) normed[j] *= saved.input[row];
    return normed;
  };

  if (dx) prepare<T, 3>({&scratch.wq, &scratch.wk, &scratch.wv}, {&op.wq, &op.wk, &op.wv});
  for_row_chunks(s.cut(), [&](i64 first, i64 count, int worker) {
    const T* own = dqkv + first * width;
    T* du = scratch.du + first * adapters.width();
    if (adapters.numbers) {
      adapters.up_backward(first / s.T, 0, count, own, width, du);
      adapters.up_backward(first / s.T, 1, count, own + from_v, width, du);
      round(du, count * adapters.width());
    }
    if (!dx) {
      for (i64 row = first; row < first + count; ++row) round(normed_again(row), d);
      return;
    }
    T* dnormed = scratch.dnormed.of(worker);
    scratch.wq.multiply(count, own, width, kFromZero, dnormed, d);
    scratch.wk.multiply(count, own + from_k, width, kFromC, dnormed, d);
    scratch.wv.multiply(count, own + from_v, width, kFromC, dnormed, d);
    round(dnormed, count * d);
    if (adapters.numbers) adapters.down_backward(first / s.T, count, du, dnormed);

    T *dmix0 = scratch.vectors.start(first), *dmix1 = dmix0 + d, *dweight = dmix1 + d;
    for (i64 row = first; row < first + count; ++row) {
      T *normed = normed_again(row), *g = dx + row * d;
      rms_row_backward<true>(normed, saved.input[row], dnormed + (row - first) * d, d, g, T(op.norm_scale));
      round(normed, d);
      // g is now the whole gradient at the mixed input.
      const T *x = input.x + row * d, *x0 = input.x0 + row * d;
      if (dskip) {
        const T *skip = input.skip + row * d, *weight = input.skip_weight;
        PGOLF_SIMD
        for (i64 j = 0; j < d; ++j) {
          const T at_sum = input.mix0[j] * g[j];
          dmix0[j] += g[j] * (x[j] + weight[j] * skip[j]);
          dweight[j] += at_sum * skip[j];
          dskip[row * d + j] = weight[j] * at_sum;
        }
        round(dskip + row * d, d);
      } else {
        PGOLF_SIMD
        for (i64 j = 0; j < d; ++j) dmix0[j] += g[j] * x[j];
      }
      if (dx0) {
        T* g0 = dx0 + row * d;
        PGOLF_SIMD
        for (i64 j = 0; j < d; ++j) g0[j] += input.mix1[j] * g[j];
      }
      PGOLF_SIMD
      for (i64 j = 0; j < d; ++j) {
        dmix1[j] += g[j] * x0[j];
        g[j] *= input.mix0[j];
      }
      if (pending) {
        PGOLF_SIMD
        for (i64 j = 0; j < d; ++j) g[j] += pending[row * d + j];
      }
      round(g, d);
    }
  });
  if (grads.resid_mix) scratch.vectors.add_to(grads.resid_mix.as<T>(), 0, 2 * d);
  if (grads.skip_weight) scratch.vectors.add_to(grads.skip_weight.as<T>(), 2 * d, d);
  if (dadapters.numbers)
    parallel_for(s.N / s.T, [&](i64 sequence) {
      const i64 row = sequence * s.T;
      const T* u = saved.u + row * adapters.width();
      dadapters.clear(sequence);
      dadapters.a_gradient(sequence, s.T, scratch.du + row * adapters.width(), scratch.normed + row * d);
      dadapters.b_gradient(sequence, 0, s.T, dqkv + row * width, width, u);
      dadapters.b_gradient(sequence, 1, s.T, dqkv + row * width + from_v, width, u);
    });
  if (!grads.wq) return;
  scratch.gradients.add(s.N, scratch.normed,
                        {{dqkv, width, s.H * s.D, grads.wq.as<T>()},
                         {dqkv + from_k, width, s.K * s.D, grads.wk.as<T>()},
                         {dqkv + from_v, width, s.K * s.D, grads.wv.as<T>()}});
}

#define PGOLF_INSTANTIATE(T)                                              \
  template OpBytes CpuBackend<T>::qkv_bytes(const Qkv&) const;            \
  template void CpuBackend<T>::qkv_forward(const Qkv&);                   \
  template void CpuBackend<T>::qkv_backward(const Qkv&, const QkvGrads&); \
  template void CpuBackend<T>::heads_backward(const Qkv&, const TensorView&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
