// Gradient norm, AdamW, Muon with Newton–Schulz, averaging.  docs/spec.md §3
#include "core/random.h"
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"
#include "grad_norm.h"

PGOLF_CPU_BEGIN
namespace {

inline constexpr i64 kElementChunk = 16384;  // 64 KiB of floats a task

template <class F>
void for_elements(i64 size, F&& body) {  // body(first, last)
  parallel_for(chunks_of(size, kElementChunk), [&](i64 index) {
    const i64 first = index * kElementChunk;
    body(first, size < first + kElementChunk ? size : first + kElementChunk);
  });
}

// One step of AdamW on numbers [first, last).
template <class T>
struct Adam {
  T beta1, rest1, beta2, rest2, eps, root_bias2, scale, rate, keep;

  Adam(double b1, double b2, double epsilon, double bias1, double bias2, double grad_scale, double lr, double decay)
      : beta1(T(b1)),
        rest1(T(1 - b1)),
        beta2(T(b2)),
        rest2(T(1 - b2)),
        eps(T(epsilon)),
        root_bias2(T(std::sqrt(bias2))),
        scale(T(grad_scale)),
        rate(T(lr / bias1)),
        keep(T(1 - lr * decay)) {}

  void step(i64 first, i64 last, const T* grad, T* w, T* m, T* v) const {
    PGOLF_SIMD
    for (i64 i = first; i < last; ++i) {
      const T g = grad[i] * scale;
      m[i] = beta1 * m[i] + rest1 * g;
      v[i] = beta2 * v[i] + rest2 * g * g;
      w[i] = w[i] * keep - rate * m[i] / (std::sqrt(v[i]) / root_bias2 + eps);
    }
  }
};

// Newton–Schulz works on the wide orientation: r = min(rows, cols), c = max(rows, cols).
template <class T>
struct NewtonSchulz {
  i64 r, c;
  T *x, *next, *gram, *poly;  // [r, c] twice, [r, r] twice
  T* packed;                  // x as a right-hand side
  T* row_factors;             // [rows], of u as it stands

  NewtonSchulz(Layout& layout, i64 rows, i64 cols) : r(rows < cols ? rows : cols), c(rows < cols ? cols : rows) {
    x = layout.take<T>(r * c);
    next = layout.take<T>(r * c);
    gram = layout.take<T>(r * r);
    poly = layout.take<T>(r * r);
    packed = layout.take<T>(packed_size<T>(c, r));
    row_factors = layout.take<T>(rows);
  }

  void run(const NewtonSchulzSteps& steps, Rounding rounding) {
    double squares = 0;
    PGOLF_SIMD_SUM(squares)
    for (i64 i = 0; i < r * c; ++i) squares += double(x[i]) * double(x[i]);
    const T inverse = T(1.0 / (std::sqrt(squares) + 1e-7));
    for (i64 i = 0; i < r * c; ++i) x[i] *= inverse;
    round_values(rounding, x, r * c);
    for (int step = 0; step < steps.steps; ++step) {
      const T a = T(steps.of(step).a), b = T(steps.of(step).b), q = T(steps.of(step).c);
      gemm_symmetric<T>(r, c, x, c, gram);
      round_values(rounding, gram, r * r);
      gemm_symmetric<T>(r, r, gram, r, poly);  // the Gram matrix is symmetric: its square is G·Gᵀ
      for (i64 i = 0; i < r * r; ++i) poly[i] = q * poly[i] + b * gram[i];
      round_values(rounding, poly, r * r);
      for (i64 i = 0; i < r * c; ++i) next[i] = a * x[i];
      for (i64 i = 0; i < panels_of<T>(c); ++i) pack_panel<T>(kPlain, c, r, x, c, i, packed);
      gemm_packed<T>(r, c, r, poly, r, packed, kFromC, next, c);
      round_values(rounding, next, r * c);
      T* swap = x;
      x = next;
      next = swap;
    }
  }
};

// Copies u [rows, cols] into x or back, through a transposition where rows > cols.
template <class T, class F>
void orient(i64 rows, i64 cols, T* x, F&& element) {
  if (rows <= cols) {
    for (i64 i = 0; i < rows * cols; ++i) element(i, x[i]);
    return;
  }
  constexpr i64 kTile = 32;
  for (i64 r0 = 0; r0 < rows; r0 += kTile)
    for (i64 c0 = 0; c0 < cols; c0 += kTile)
      for (i64 r = r0; r < rows && r < r0 + kTile; ++r)
        for (i64 c = c0; c < cols && c < c0 + kTile; ++c) element(r * cols + c, x[c * rows + r]);
}

// u's rows, of which ns.x holds the numbers, each over max(its L2 norm, 1e−7).
template <class T>
void normalize_rows(i64 rows, i64 cols, const T* grad, const T* m, T scale, T momentum, NewtonSchulz<T>& ns) {
  for (i64 row = 0; row < rows; ++row) {
    double squares = 0;
    PGOLF_SIMD_SUM(squares)
    for (i64 i = row * cols; i < (row + 1) * cols; ++i) {
      const double u = double(grad[i] * scale + momentum * m[i]);
      squares += u * u;
    }
    ns.row_factors[row] = T(1.0 / std::fmax(std::sqrt(squares), 1e-7));
  }
  orient(rows, cols, ns.x, [&](i64 i, T& x) { x *= ns.row_factors[i / cols]; });
}

template <class T>
std::size_t newton_schulz_bytes(const TensorView& u) {
  Layout layout;
  NewtonSchulz<T>(layout, u.shape[0], u.shape[1]);
  return layout.used();
}

}  // namespace

template <class T>
void CpuBackend<T>::grad_norm(std::span<const TensorView> grads, StepValues* values) {
  constexpr std::size_t kBatch = 1024;  // tensors whose sums are kept at a time
  double total = 0, sums[kBatch];
  for (std::size_t start = 0; start < grads.size(); start += kBatch) {
    const std::size_t count = grads.size() - start < kBatch ? grads.size() - start : kBatch;
    parallel_for(static_cast<i64>(count), [&](i64 i) {
      const T* g = grads[start + static_cast<std::size_t>(i)].template as<T>();
      const i64 size = grads[start + static_cast<std::size_t>(i)].size();
      double sum = 0;
      PGOLF_SIMD_SUM(sum)
      for (i64 j = 0; j < size; ++j) sum += double(g[j]) * double(g[j]);
      sums[i] = sum;
    });
    for (std::size_t i = 0; i < count; ++i) total += sums[i];
  }
  settle_step(std::sqrt(total), values);
}

template <class T>
void CpuBackend<T>::adam(std::span<const AdamTensor> tensors, const StepValues* values) {
  if (!values->finite) return;
  for (const AdamTensor& t : tensors) {
    const Adam<T> adam(values->beta1, values->beta2, values->eps, values->bias1, values->bias2, values->grad_scale,
                       values->lr[t.group], values->weight_decay[t.group]);
    for_elements(t.w.size(), [&](i64 first, i64 last) {
      adam.step(first, last, t.grad.as<T>(), t.w.as<T>(), t.m.as<T>(), t.v.as<T>());
    });
  }
}

template <class T>
void CpuBackend<T>::adapters_begin(std::span<const AdapterRows> adapters, const TensorView& documents,
                                   std::uint64_t seed) {
  parallel_for(documents.size(), [&](i64 row) {
    const std::int32_t document = documents.as<std::int32_t>()[row];
    if (document < 0) return;
    for (const AdapterRows& t : adapters) {
      const i64 size = t.w.shape[1], drawn = t.products * t.a_size;
      T *w = t.w.as<T>() + row * size, *m = t.m.as<T>() + row * size, *v = t.v.as<T>() + row * size;
      for (i64 i = 0; i < drawn; ++i) {
        const TensorRandom random(seed, t.streams[i / t.a_size], static_cast<std::uint32_t>(document));
        w[i] = static_cast<T>(static_cast<float>(random.uniform(static_cast<std::uint64_t>(i % t.a_size), t.bound)));
      }
      for (i64 i = drawn; i < size; ++i) w[i] = 0;
      for (i64 i = 0; i < size; ++i) m[i] = v[i] = 0;
      copy_adapters(t, row);
    }
  });
}

template <class T>
void CpuBackend<T>::adapters_step(std::span<const AdapterRows> adapters, const TensorView& steps,
                                  const AdapterAdam& settings) {
  parallel_for(steps.size(), [&](i64 row) {
    const std::int32_t step = steps.as<std::int32_t>()[row];
    if (step < 1) return;
    const Adam<T> adam(settings.beta1, settings.beta2, settings.eps, 1 - std::pow(settings.beta1, step),
                       1 - std::pow(settings.beta2, step), settings.grad_scale, settings.lr, 0);
    for (const AdapterRows& t : adapters) {
      const i64 size = t.w.shape[1];
      adam.step(row * size, (row + 1) * size, t.grad.as<T>(), t.w.as<T>(), t.m.as<T>(), t.v.as<T>());
      copy_adapters(t, row);
    }
  });
}

template <class T>
void CpuBackend<T>::copy_adapters(const AdapterRows& t, i64 row) const {
  if (!t.copy) return;
  const i64 size = t.w.shape[1];
  const T* w = t.w.as<T>() + row * size;
  T* copy = t.copy.as<T>() + row * size;
  for (i64 i = 0; i < size; ++i) copy[i] = w[i];
  round(copy, size);
}

template <class T>
std::size_t CpuBackend<T>::muon_scratch(std::span<const MuonTensor> tensors) const {
  std::size_t worst = 0;
  for (const MuonTensor& t : tensors) {
    const std::size_t bytes = newton_schulz_bytes<T>(t.w);
    if (bytes > worst) worst = bytes;
  }
  return worst * static_cast<std::size_t>(concurrency());
}

template <class T>
void CpuBackend<T>::muon(std::span<const MuonTensor> tensors, const MuonRule& rule, const StepValues* values,
                         void* scratch) {
  if (!values->finite) return;
  const std::size_t per_worker = muon_scratch(tensors) / static_cast<std::size_t>(concurrency());
  const T momentum = T(values->momentum), scale = T(values->grad_scale);
  // A matrix is one task, whole: its products are too small to cut.
  parallel_for(static_cast<i64>(tensors.size()), [&](i64 index) {
    const MuonTensor& t = tensors[static_cast<std::size_t>(index)];
    const i64 rows = t.w.shape[0], cols = t.w.shape[1];
    Layout layout(static_cast<char*>(scratch) + per_worker * static_cast<std::size_t>(worker_index()));
    NewtonSchulz<T> ns(layout, rows, cols);
    T *w = t.w.as<T>(), *m = t.momentum.as<T>();
    const T* grad = t.grad.as<T>();
    orient(rows, cols, ns.x, [&](i64 i, T& x) {
      const T g = grad[i] * scale;
      m[i] = momentum * m[i] + g;
      x = g + momentum * m[i];
    });
    if (rule.normalize_rows) normalize_rows(rows, cols, grad, m, scale, momentum, ns);
    ns.run(rule.steps, rounding_);
    const double ratio = double(rows) / double(cols);
    const T rate = T(values->lr[kMatrix] * std::sqrt(ratio > 1 ? ratio : 1.0));
    const T keep = T(1 - values->lr[kMatrix] * values->weight_decay[kMatrix]);
    orient(rows, cols, ns.x, [&](i64 i, T& x) { w[i] = w[i] * keep - rate * x; });
  });
}

template <class T>
std::size_t CpuBackend<T>::newton_schulz_scratch(const TensorView& u) const {
  return newton_schulz_bytes<T>(u);
}

template <class T>
void CpuBackend<T>::newton_schulz(const TensorView& u, const TensorView& out, const NewtonSchulzSteps& steps,
                                  void* scratch) {
  const i64 rows = u.shape[0], cols = u.shape[1];
  Layout layout(scratch);
  NewtonSchulz<T> ns(layout, rows, cols);
  orient(rows, cols, ns.x, [&](i64 i, T& x) { x = u.as<T>()[i]; });
  ns.run(steps, rounding_);
  orient(rows, cols, ns.x, [&](i64 i, T& x) { out.as<T>()[i] = x; });
}

template <class T>
void CpuBackend<T>::add_sum(const TensorView& t, double* sum) {
  const T* x = t.as<T>();
  double total = 0;
  PGOLF_SIMD_SUM(total)
  for (i64 i = 0; i < t.size(); ++i) total += double(x[i]);
  *sum += total;
}

template <class T>
void CpuBackend<T>::axpby(double a, const TensorView& x, double b, const TensorView& y, const StepValues* gate) {
  if (gate && gate->stopped) return;
  const T ta = T(a), tb = T(b);
  for_elements(x.size(), [&](i64 first, i64 last) {
    const T* from = x.as<T>();
    T* to = y.as<T>();
    PGOLF_SIMD
    for (i64 i = first; i < last; ++i) to[i] = ta * from[i] + tb * to[i];
  });
}

#define PGOLF_INSTANTIATE(T)                                                                                         \
  template void CpuBackend<T>::grad_norm(std::span<const TensorView>, StepValues*);                                  \
  template void CpuBackend<T>::adam(std::span<const AdamTensor>, const StepValues*);                                 \
  template void CpuBackend<T>::adapters_begin(std::span<const AdapterRows>, const TensorView&, std::uint64_t);       \
  template void CpuBackend<T>::adapters_step(std::span<const AdapterRows>, const TensorView&, const AdapterAdam&);   \
  template std::size_t CpuBackend<T>::muon_scratch(std::span<const MuonTensor>) const;                               \
  template void CpuBackend<T>::muon(std::span<const MuonTensor>, const MuonRule&, const StepValues*, void*);         \
  template std::size_t CpuBackend<T>::newton_schulz_scratch(const TensorView&) const;                                \
  template void CpuBackend<T>::newton_schulz(const TensorView&, const TensorView&, const NewtonSchulzSteps&, void*); \
  template void CpuBackend<T>::add_sum(const TensorView&, double*);                                                  \
  template void CpuBackend<T>::axpby(double, const TensorView&, double, const TensorView&, const StepValues*);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)
PGOLF_CPU_END
