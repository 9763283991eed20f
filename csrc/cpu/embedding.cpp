// Token and bigram embedding, norm and smear gate.
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

PGOLF_CPU_BEGIN
namespace {

// The tokens that read each row of a table, in token order: makes scatter-adds ordered and parallel.
struct Readers {
  std::int32_t *start, *token;  // token[start[r] … start[r+1]) read row r
  i64 rows;

  Readers(Layout& layout, i64 table_rows, i64 tokens) : rows(table_rows) {
    start = layout.take<std::int32_t>(table_rows + 1);
    token = layout.take<std::int32_t>(tokens);
  }

  template <class RowOf>
  void sort(i64 tokens, RowOf row_of) {
    for (i64 r = 0; r <= rows; ++r) start[r] = 0;
    for (i64 t = 0; t < tokens; ++t) ++start[row_of(t)];
    std::int32_t sum = 0;
    for (i64 r = 0; r <= rows; ++r) start[r] = sum += start[r];
    for (i64 t = tokens; t-- > 0;) token[--start[row_of(t)]] = static_cast<std::int32_t>(t);
  }

  // table[r] += scale·Σ grad[t] over the readers t of r
  template <class T>
  void scatter(const T* grad, T scale, i64 width, T* table) const {
    constexpr i64 kTableRows = 32;
    parallel_for(chunks_of(rows, kTableRows), [&](i64 index) {
      const i64 end = rows < (index + 1) * kTableRows ? rows : (index + 1) * kTableRows;
      for (i64 r = index * kTableRows; r < end; ++r) {
        T* out = table + r * width;
        for (std::int32_t i = start[r]; i < start[r + 1]; ++i) {
          const T* g = grad + token[i] * width;
          PGOLF_SIMD
          for (i64 j = 0; j < width; ++j) out[j] += scale * g[j];
        }
      }
    });
  }
};

template <class T>
struct Dims {
  i64 B, T_, N, V, d, n, e;
  bool bigram, project;
  explicit Dims(const Embed& op)
      : B(op.ids.shape[0]),
        T_(op.ids.shape[1]),
        N(B * T_),
        V(op.tok_emb.shape[0]),
        d(op.tok_emb.shape[1]),
        n(op.bigram_emb.shape[0]),
        e(op.bigram_emb.shape[1]),
        bigram(op.bigram_emb),
        project(op.bigram_proj) {}
};

template <class T>
struct Saved {
  T *normed, *factor;
  Saved(Layout& layout, const Dims<T>& s) {
    normed = layout.take<T>(s.N * s.d);
    factor = layout.take<T>(s.N);
  }
};

template <class T>
struct BackwardScratch {
  T* dsum;       // [N, d] gradient at the sum of embeddings
  T* gathered;   // [N, e] bigram rows, where they are projected
  T* dgathered;  // [N, e] dsum·proj
  T* gate;       // [d] sigmoid(smear_gate)
  Readers tokens, buckets;
  ColumnSums<T> dgate, dscale;
  WeightGradients<T> gradients;
  BackwardScratch(Layout& layout, const Dims<T>& s)
      : dsum(layout.take<T>(s.N * s.d)),
        gathered(layout.take<T>(s.project ? s.N * s.e : 0)),
        dgathered(layout.take<T>(s.project ? s.N * s.e : 0)),
        gate(layout.take<T>(s.d)),
        tokens(layout, s.V, s.N),
        buckets(layout, s.bigram ? s.n : 0, s.bigram ? s.N : 0),
        dgate(layout, s.N, s.d),
        dscale(layout, s.N, 1),
        gradients(layout, s.project ? s.N : 0, s.e) {}
};

PGOLF_INLINE i64 bigram_bucket(const std::int32_t* ids, i64 row, i64 length, i64 n) {
  if (row % length == 0) return n - 1;
  const auto hash = static_cast<std::int32_t>((36313u * static_cast<std::uint32_t>(ids[row])) ^
                                              (27191u * static_cast<std::uint32_t>(ids[row - 1])));
  const i64 remainder = hash % (n - 1);
  return remainder < 0 ? remainder + (n - 1) : remainder;
}

// Whether position `row` takes a share of the position before it.
PGOLF_INLINE bool smears(const Embed& op, const std::int32_t* ids, i64 row, i64 length) {
  return row % length != 0 && !(op.reset_at_bos && ids[row] == op.bos_id);
}

template <class T>
struct ForwardScratch {
  PerWorker<T> gathered;  // [kRowChunk, e] bigram rows, where they are projected
  T* gate;                // [d] sigmoid(smear_gate)
  ForwardScratch(Layout& layout, int workers, const Dims<T>& s)
      : gathered(layout, workers, s.project ? kRowChunk * s.e : 0), gate(layout.take<T>(s.d)) {}
};

template <class T>
void sigmoid(const T* x, i64 count, T* out) {
  for (i64 i = 0; i < count; ++i) out[i] = T(1) / (T(1) + std::exp(-x[i]));
}

}  // namespace

template <class T>
OpBytes CpuBackend<T>::embed_bytes(const Embed& op) const {
  const Dims<T> s(op);
  Layout saved, forward, backward;
  Saved<T>(saved, s);
  ForwardScratch<T>(forward, concurrency(), s);
  BackwardScratch<T>(backward, s);
  return {saved.used(), forward.used(), backward.used()};
}

template <class T>
void CpuBackend<T>::embed_forward(const Embed& op) {
  const Dims<T> s(op);
  Layout saved_layout(op.saved.data), scratch_layout(op.scratch.data);
  const Saved<T> saved(saved_layout, s);
  const ForwardScratch<T> scratch(scratch_layout, concurrency(), s);
  const auto* ids = op.ids.as<std::int32_t>();
  const T* table = op.tok_emb.as<T>();
  const T* bigrams = op.bigram_emb.as<T>();
  const T scale = s.bigram ? *op.bigram_scale.as<T>() : T(0);

  for_row_chunks(s.N, [&](i64 first, i64 count, int worker) {
    T* sum = saved.normed + first * s.d;
    T* gathered = scratch.gathered.of(worker);
    for (i64 i = 0; i < count; ++i) {
      const T* token = table + ids[first + i] * s.d;
      for (i64 j = 0; j < s.d; ++j) sum[i * s.d + j] = token[j];
      if (!s.bigram) continue;
      const T* bigram = bigrams + bigram_bucket(ids, first + i, s.T_, s.n) * s.e;
      if (s.project)
        for (i64 j = 0; j < s.e; ++j) gathered[i * s.e + j] = bigram[j];
      else
        for (i64 j = 0; j < s.d; ++j) sum[i * s.d + j] += scale * bigram[j];
    }
    if (s.project)
      gemm_blocks<T>(kPlain, kTransposed, count, s.d, s.e, scale, gathered, s.e, op.bigram_proj.as<T>(), s.e, sum, s.d);
    for (i64 i = 0; i < count; ++i) saved.factor[first + i] = rms_row(sum + i * s.d, s.d, sum + i * s.d);
  });

  sigmoid(op.smear_gate.as<T>(), s.d, scratch.gate);
  const T* gate = scratch.gate;
  for_row_chunks(s.N, [&](i64 first, i64 count, int) {
    for (i64 row = first; row < first + count; ++row) {
      const T* x = saved.normed + row * s.d;
      T* out = op.x0.as<T>() + row * s.d;
      PGOLF_SIMD
      for (i64 j = 0; j < s.d; ++j) out[j] = (T(1) - gate[j]) * x[j];
      if (smears(op, ids, row, s.T_)) {
        const T* before = x - s.d;
        PGOLF_SIMD
        for (i64 j = 0; j < s.d; ++j) out[j] += gate[j] * before[j];
      }
      round(out, s.d);
    }
  });
}

template <class T>
void CpuBackend<T>::embed_backward(const Embed& op, const EmbedGrads& grads) {
  const Dims<T> s(op);
  Layout saved_layout(op.saved.data), scratch_layout(grads.scratch.data);
  const Saved<T> saved(saved_layout, s);
  BackwardScratch<T> scratch(scratch_layout, s);
  const auto* ids = op.ids.as<std::int32_t>();
  sigmoid(op.smear_gate.as<T>(), s.d, scratch.gate);
  const T* gate = scratch.gate;

  for_row_chunks(s.N, [&](i64 first, i64 count, int) {
    T* dgate = scratch.dgate.start(first);  // before the sigmoid's slope g(1−g)
    for (i64 row = first; row < first + count; ++row) {
      const T *x = saved.normed + row * s.d, *dy = grads.dx0.as<T>() + row * s.d;
      T* dn = scratch.dsum + row * s.d;
      PGOLF_SIMD
      for (i64 j = 0; j < s.d; ++j) {
        dn[j] = (T(1) - gate[j]) * dy[j];
        dgate[j] -= dy[j] * x[j];
      }
      if (smears(op, ids, row, s.T_)) {
        const T* before = x - s.d;
        PGOLF_SIMD
        for (i64 j = 0; j < s.d; ++j) dgate[j] += dy[j] * before[j];
      }
      if (row + 1 < s.N && smears(op, ids, row + 1, s.T_)) {
        const T* dy_next = dy + s.d;
        PGOLF_SIMD
        for (i64 j = 0; j < s.d; ++j) dn[j] += gate[j] * dy_next[j];
      }
      rms_row_backward<false>(x, saved.factor[row], dn, s.d, dn);
      round(dn, s.d);
    }
    for (i64 j = 0; j < s.d; ++j) dgate[j] *= gate[j] * (T(1) - gate[j]);
  });
  scratch.dgate.add_to(grads.smear_gate.as<T>());

  scratch.tokens.sort(s.N, [&](i64 t) { return i64(ids[t]); });
  scratch.tokens.scatter(scratch.dsum, T(1), s.d, grads.tok_emb.as<T>());
  if (!s.bigram) return;

  const T scale = *op.bigram_scale.as<T>();
  const T* bigrams = op.bigram_emb.as<T>();
  const T* dread = s.project ? scratch.dgathered : scratch.dsum;  // the gradient at scale·(bigram row)
  for_row_chunks(s.N, [&](i64 first, i64 count, int) {
    if (s.project)
      gemm<T>(kPlain, kPlain, count, s.e, s.d, scratch.dsum + first * s.d, s.d, op.bigram_proj.as<T>(), s.e, kFromZero,
              scratch.dgathered + first * s.e, s.e);
    T* dscale = scratch.dscale.start(first);
    for (i64 row = first; row < first + count; ++row) {
      const T* bigram = bigrams + bigram_bucket(ids, row, s.T_, s.n) * s.e;
      *dscale += dot(dread + row * s.e, bigram, s.e);
      if (s.project)
        for (i64 j = 0; j < s.e; ++j) scratch.gathered[row * s.e + j] = bigram[j];
    }
  });
  scratch.dscale.add_to(grads.bigram_scale.as<T>());
  if (s.project)
    scratch.gradients.add(s.N, scratch.gathered, {{scratch.dsum, s.d, s.d, grads.bigram_proj.as<T>()}}, scale);
  scratch.buckets.sort(s.N, [&](i64 t) { return bigram_bucket(ids, t, s.T_, s.n); });
  scratch.buckets.scatter(dread, scale, s.e, grads.bigram_emb.as<T>());
}

#define PGOLF_INSTANTIATE(T)                                       \
  template OpBytes CpuBackend<T>::embed_bytes(const Embed&) const; \
  template void CpuBackend<T>::embed_forward(const Embed&);        \
  template void CpuBackend<T>::embed_backward(const Embed&, const EmbedGrads&);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
