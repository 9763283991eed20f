// What the operations do to rows of d numbers, and how they cut N rows into pieces.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/parallel.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "pieces.h"

PGOLF_CPU_BEGIN

// Rows done by one task: the numbers of 128 rows of 512 and of 1,536 floats stay in a core's second-level cache between
// the norm, the product and what follows it, and there are tasks for many threads.
inline constexpr i64 kRowChunk = 128;

PGOLF_INLINE i64 chunks_of(i64 rows, i64 chunk = kRowChunk) { return (rows + chunk - 1) / chunk; }

// How rows are cut: into chunks of at most `chunk`, none of which goes beyond a multiple of `period`. A period of all
// rows gives the tallest chunks; one of a sequence's rows computes every sequence alike, wherever it stands.
struct RowCut {
  i64 rows, period, chunk = kRowChunk;

  PGOLF_INLINE i64 chunks_in_period() const { return chunks_of(period, chunk); }
  PGOLF_INLINE i64 chunks() const { return rows ? rows / period * chunks_in_period() : 0; }
  PGOLF_INLINE i64 first(i64 index) const {
    return index / chunks_in_period() * period + index % chunks_in_period() * chunk;
  }
  PGOLF_INLINE i64 index(i64 first_row) const {
    return first_row / period * chunks_in_period() + first_row % period / chunk;
  }
  PGOLF_INLINE i64 count(i64 first_row) const {
    const i64 left = period - first_row % period;
    return left < chunk ? left : chunk;
  }
};

// body(first_row, row_count, worker) for every chunk of rows, in parallel.
template <class F>
void for_row_chunks(const RowCut& cut, F&& body) {
  parallel_for(cut.chunks(), [&](i64 index) {
    const i64 first = cut.first(index);
    body(first, cut.count(first), worker_index());
  });
}
template <class F>
void for_row_chunks(i64 rows, F&& body, i64 chunk = kRowChunk) {
  for_row_chunks(RowCut{rows, rows, chunk}, body);
}

// A right-hand side B [k,n] that chunks of rows share, most often weights: packed once an operation, over the pool,
// which costs 1 % of the products of 4,096 rows where every chunk's own packing would cost a tenth. Where there is one
// chunk there is nothing to share, and B is read where it stands.
template <class T>
struct SharedRight {
  const T* numbers = nullptr;
  Transpose transposed;  // B stands here as [n,k]
  i64 n, k;
  T* packed;

  SharedRight(Layout& layout, i64 rows, Transpose how, i64 columns, i64 depth)
      : transposed(how),
        n(columns),
        k(depth),
        packed(rows > kRowChunk ? layout.take<T>(packed_size<T>(columns, depth)) : nullptr) {}

  // c [m,n] = (c +) a [m,k]·B
  void multiply(i64 m, const T* a, i64 lda, Start start, T* c, i64 ldc) const {
    if (packed)
      gemm_packed<T>(m, n, k, a, lda, packed, start, c, ldc);
    else
      gemm<T>(kPlain, transposed, m, n, k, a, lda, numbers, ld(), start, c, ldc);
  }
  i64 ld() const { return transposed ? k : n; }
};

// Says where each B stands, and packs them.
template <class T, int kCount>
void prepare(SharedRight<T>* const (&parts)[kCount], const TensorView* const (&tensors)[kCount]) {
  i64 panels = 0;
  for (int i = 0; i < kCount; ++i) {
    parts[i]->numbers = tensors[i]->template as<T>();
    if (parts[i]->packed) panels += panels_of<T>(parts[i]->n);
  }
  parallel_for(panels, [&](i64 task) {
    int i = 0;
    while (task >= panels_of<T>(parts[i]->n)) task -= panels_of<T>(parts[i++]->n);
    const SharedRight<T>& part = *parts[i];
    pack_panel<T>(part.transposed, part.n, part.k, part.numbers, part.ld(), task, part.packed);
  });
}
template <class T>
void prepare(SharedRight<T>& part, const TensorView& tensor) {
  prepare<T, 1>({&part}, {&tensor});
}

template <class T>
PGOLF_INLINE T dot(const T* a, const T* b, i64 n) {
  T sum = 0;
  PGOLF_SIMD_SUM(sum)
  for (i64 i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// y = scale·rms(x); returns the factor. y may be x.
template <class T>
PGOLF_INLINE T rms_row(const T* x, i64 d, T* y, T scale = T(1)) {
  const T factor = scale / std::sqrt(dot(x, x, d) / T(d) + T(kRmsEpsilon));
  PGOLF_SIMD
  for (i64 i = 0; i < d; ++i) y[i] = x[i] * factor;
  return factor;
}

// dx = (or +=) the gradient at x of y = scale·rms(x), given y, its factor and dy. dx may be dy.
template <bool kAdd, class T>
PGOLF_INLINE void rms_row_backward(const T* y, T factor, const T* dy, i64 d, T* dx, T scale = T(1)) {
  const T mean = dot(dy, y, d) / (T(d) * scale * scale);
  PGOLF_SIMD
  for (i64 i = 0; i < d; ++i) {
    const T g = factor * (dy[i] - y[i] * mean);
    dx[i] = kAdd ? dx[i] + g : g;
  }
}

// Sums over rows, for the gradients of vectors: a partial sum a chunk, then the chunks in order.
template <class T>
struct ColumnSums {
  T* partial;
  RowCut cut;
  i64 width;

  ColumnSums(Layout& layout, const RowCut& rows, i64 columns) : cut(rows), width(columns) {
    partial = layout.take<T>(width * cut.chunks());
  }
  ColumnSums(Layout& layout, i64 rows, i64 columns) : ColumnSums(layout, RowCut{rows, rows}, columns) {}
  T* start(i64 first_row) const {  // the zeroed partial of the chunk that begins at first_row
    T* p = partial + cut.index(first_row) * width;
    for (i64 j = 0; j < width; ++j) p[j] = 0;
    return p;
  }
  void add_to(T* out, i64 from = 0, i64 count = -1) const {
    if (count < 0) count = width;
    for (i64 c = 0; c < cut.chunks(); ++c)
      for (i64 j = 0; j < count; ++j) out[j] += partial[c * width + from + j];
  }
};

// w[rows, cols] += alpha·yᵀ[rows, m]·x[m, cols]
template <class T>
struct WeightGradient {
  const T* y;
  i64 stride, rows;  // of y
  T* w;
};

// Weight gradients that share x [m, cols]. x is packed once for all of them over the pool, a block of the sums over
// tokens at a time, or several that are 1 MiB together: the part of it that a task reads stays in L2 for the next one.
// Then the outputs are cut into tiles over the pool, of few rows where there are few, so that several threads have one.
template <class T>
class WeightGradients {
 public:
  WeightGradients(Layout& layout, i64 rows, i64 columns) : cols_(columns), span_(kSumBlock) {  // rows: the most of them
    constexpr i64 kNumbers = i64{1} << 18;
    while (span_ < rows && 2 * span_ * cols_ <= kNumbers) span_ *= 2;
    packed_ = layout.take<T>(packed_size<T>(cols_, rows < span_ ? rows : span_));
  }

  template <int kCount>
  void add(i64 m, const T* x, const WeightGradient<T> (&parts)[kCount], T alpha = T(1)) const {
    i64 all = 0;
    for (const auto& part : parts) all += tiles_of(part);
    for (i64 from = 0; from < m; from += span_) {
      const i64 rows = m - from < span_ ? m - from : span_, panels = panels_of<T>(cols_);
      parallel_for(chunks_of(rows, kSumBlock) * panels, [&](i64 task) {
        const i64 l = task / panels * kSumBlock;
        pack_panel<T>(kPlain, cols_, depth_at(l, rows), x + (from + l) * cols_, cols_, task % panels, block(l));
      });
      parallel_for(all, [&](i64 task) {
        int index = 0;
        while (task >= tiles_of(parts[index])) task -= tiles_of(parts[index++]);
        const WeightGradient<T>& part = parts[index];
        const i64 step = tile_rows(part), row_tiles = chunks_of(part.rows, step);
        const i64 r = task % row_tiles * step, c = task / row_tiles * kMaxCols;
        const i64 height = part.rows - r < step ? part.rows - r : step;
        const i64 width = cols_ - c < kMaxCols ? cols_ - c : kMaxCols;
        for (i64 l = 0; l < rows; l += kSumBlock)
          gemm_packed_block<T>(height, width, depth_at(l, rows), alpha, part.y + (from + l) * part.stride + r,
                               part.stride, block(l) + c * depth_at(l, rows), part.w + r * cols_ + c, cols_);
      });
    }
  }

 private:
  static constexpr i64 kMaxCols = 512;  // a whole number of panels
  static i64 tile_rows(const WeightGradient<T>& part) { return part.rows >= 256 ? 128 : 64; }
  i64 col_tiles() const { return chunks_of(cols_, kMaxCols); }
  i64 tiles_of(const WeightGradient<T>& part) const { return chunks_of(part.rows, tile_rows(part)) * col_tiles(); }
  static i64 depth_at(i64 l, i64 rows) { return rows - l < kSumBlock ? rows - l : kSumBlock; }
  T* block(i64 l) const { return packed_ + packed_size<T>(cols_, l); }

  i64 cols_, span_;
  T* packed_;
};

// Reads a block's mixed input row by row.
template <class T>
struct MixedRows {
  const T *x, *x0, *mix0, *mix1, *skip, *skip_weight;
  i64 d;

  explicit MixedRows(const MixedInput& in)
      : x(in.x.as<T>()),
        x0(in.x0.as<T>()),
        mix0(in.resid_mix.as<T>()),
        mix1(mix0 + in.x.shape[2]),
        skip(in.skip.as<T>()),
        skip_weight(in.skip_weight.as<T>()),
        d(in.x.shape[2]) {}

  void read(i64 row, T* out) const {
    const T *a = x + row * d, *b = x0 + row * d;
    if (skip) {
      const T* s = skip + row * d;
      PGOLF_SIMD
      for (i64 i = 0; i < d; ++i) out[i] = mix0[i] * (a[i] + skip_weight[i] * s[i]) + mix1[i] * b[i];
    } else {
      PGOLF_SIMD
      for (i64 i = 0; i < d; ++i) out[i] = mix0[i] * a[i] + mix1[i] * b[i];
    }
  }
};

PGOLF_CPU_END
