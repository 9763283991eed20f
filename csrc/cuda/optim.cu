// Gradient norm, AdamW, Muon with Newton–Schulz, averaging.  docs/spec.md §3
#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "cuda/batch.cuh"
#include "grad_norm.h"

namespace pgolf::cuda {
namespace {

i64 round_up(i64 count, i64 multiple) { return (count + multiple - 1) / multiple * multiple; }

// ---- Sums in float64: stage 1 leaves a number for each block, stage 2 adds them in one block.

using SumElements = Elements<4>;

struct Gradient {
  const float* x;
  i64 size;
};

// partials[block] += its chunks' sum of squares. Memory-bound: 1 read.
__global__ void __launch_bounds__(kThreads)
    sum_squares(const __grid_constant__ Batch<Gradient> grads, double* partials) {
  __shared__ double shared[kWarp];
  double sum = 0;
  for (unsigned chunk = blockIdx.x; chunk < grads.blocks; chunk += gridDim.x) {
    const int index = grads.entry_of(chunk);
    const i64 begin = static_cast<i64>(chunk - grads.first[index]) * SumElements::kChunk;
    SumElements g;
    g.load(grads.entries[index].x + begin, grads.entries[index].size - begin);
#pragma unroll
    for (float x : g.x) sum += static_cast<double>(x) * static_cast<double>(x);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] += sum;
}

__global__ void __launch_bounds__(CudaBackend::kPartials) finish_norm(const double* partials, StepValues* v) {
  __shared__ double shared[kWarp];
  const double scaled_norm = sqrt(block_sum(partials[threadIdx.x], shared));
  if (threadIdx.x == 0) settle_step(scaled_norm, v);
}

__global__ void __launch_bounds__(kThreads) sum_elements(const float* x, i64 size, double* partials) {
  __shared__ double shared[kWarp];
  double sum = 0;
  const i64 stride = static_cast<i64>(gridDim.x) * SumElements::kChunk;
  for (i64 begin = blockIdx.x * SumElements::kChunk; begin < size; begin += stride) {
    SumElements e;
    e.load(x + begin, size - begin);
#pragma unroll
    for (float value : e.x) sum += static_cast<double>(value);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(CudaBackend::kPartials) add_partials(const double* partials, int count, double* sum) {
  __shared__ double shared[kWarp];
  const double total = block_sum(static_cast<int>(threadIdx.x) < count ? partials[threadIdx.x] : 0.0, shared);
  if (threadIdx.x == 0) *sum += total;
}

// ---- AdamW and averaging

using AdamElements = Elements<2>;

struct AdamEntry {
  float* w;
  const float* grad;
  float *m, *v;
  i64 size;
  int group;
};

// What a step's numbers are multiplied by.
struct AdamConstants {
  float beta1, beta2, rest1, rest2, eps, root_bias2, scale, rate, keep;
  int finite;

  __device__ void set(double b1, double b2, double epsilon, double bias1, double bias2, double grad_scale, double lr,
                      double decay) {
    beta1 = static_cast<float>(b1);
    beta2 = static_cast<float>(b2);
    rest1 = static_cast<float>(1.0 - b1);
    rest2 = static_cast<float>(1.0 - b2);
    eps = static_cast<float>(epsilon);
    root_bias2 = static_cast<float>(sqrt(bias2));
    scale = static_cast<float>(grad_scale);
    rate = static_cast<float>(lr / bias1);
    keep = static_cast<float>(1.0 - lr * decay);
  }
  __device__ __forceinline__ void step(float grad, float& w, float& m, float& v) const {
    const float g = grad * scale;
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * g * g;
    w = w * keep - rate * m / (sqrtf(v) / root_bias2 + eps);
  }
};

// Memory-bound: 4 reads, 3 writes. The float64 arithmetic of the constants is done once a block, while data travels.
__global__ void __launch_bounds__(kThreads)
    adam_update(const __grid_constant__ Batch<AdamEntry> tensors, const StepValues* values) {
  __shared__ AdamConstants shared;
  const int index = tensors.entry_of(blockIdx.x);
  const AdamEntry& t = tensors.entries[index];
  const i64 begin = static_cast<i64>(blockIdx.x - tensors.first[index]) * AdamElements::kChunk;
  const i64 left = t.size - begin;
  AdamElements w, grad, m, v;
  grad.load(t.grad + begin, left);
  m.load(t.m + begin, left);
  v.load(t.v + begin, left);
  w.load(t.w + begin, left);
  if (threadIdx.x == 0) {
    shared.set(values->beta1, values->beta2, values->eps, values->bias1, values->bias2, values->grad_scale,
               values->lr[t.group], values->weight_decay[t.group]);
    shared.finite = values->finite;
  }
  __syncthreads();
  if (!shared.finite) return;
  const AdamConstants c = shared;
#pragma unroll
  for (int i = 0; i < AdamElements::kCount; ++i) c.step(grad.x[i], w.x[i], m.x[i], v.x[i]);
  m.store(t.m + begin, left);
  v.store(t.v + begin, left);
  w.store(t.w + begin, left);
}

// ---- Adapters: rows of many documents, each at a step of its own. Rows need not be aligned.

constexpr i64 kAdapterChunk = 4 * kThreads;  // of a row, done by one block

template <class S>
struct AdapterEntry {
  float* w;
  const float* grad;
  float *m, *v;
  S* copy;  // may be null
  i64 size, a_size;
  double bound;
  std::uint32_t streams[2];
  int products;

  __host__ __device__ i64 pieces() const { return (size + kAdapterChunk - 1) / kAdapterChunk; }
  // body(i, at) for the thread's numbers i of a row, which lie at `at`.
  template <class F>
  __device__ __forceinline__ void for_numbers(i64 row, i64 piece, F body) const {
#pragma unroll
    for (int j = 0; j < static_cast<int>(kAdapterChunk / kThreads); ++j) {
      const i64 i = piece * kAdapterChunk + j * kThreads + threadIdx.x;
      if (i < size) body(i, row * size + i);
    }
  }
  __device__ __forceinline__ void put(i64 at, float value) const {
    w[at] = value;
    if (copy) copy[at] = from_float<S>(value);
  }
};

// Compute-bound: Philox's ten rounds for every number of an a.
template <class S>
__global__ void __launch_bounds__(kThreads) begin_adapters(const __grid_constant__ Batch<AdapterEntry<S>> adapters,
                                                           const std::int32_t* documents, std::uint64_t seed) {
  const int index = adapters.entry_of(blockIdx.x);
  const AdapterEntry<S>& t = adapters.entries[index];
  const i64 block = blockIdx.x - adapters.first[index], row = block / t.pieces();
  const std::int32_t document = documents[row];
  if (document < 0) return;
  t.for_numbers(row, block % t.pieces(), [&](i64 i, i64 at) {
    float value = 0.0f;
    if (i < t.products * t.a_size) {
      const bool second = i >= t.a_size;
      const TensorRandom random(seed, t.streams[second], static_cast<std::uint32_t>(document));
      value = static_cast<float>(random.uniform(static_cast<std::uint64_t>(second ? i - t.a_size : i), t.bound));
    }
    t.put(at, value);
    t.m[at] = 0.0f;
    t.v[at] = 0.0f;
  });
}

// Memory-bound: 4 reads, 3 writes and the copy.
template <class S>
__global__ void __launch_bounds__(kThreads) step_adapters(const __grid_constant__ Batch<AdapterEntry<S>> adapters,
                                                          const std::int32_t* steps, AdapterAdam settings) {
  __shared__ AdamConstants shared;
  const int index = adapters.entry_of(blockIdx.x);
  const AdapterEntry<S>& t = adapters.entries[index];
  const i64 block = blockIdx.x - adapters.first[index], row = block / t.pieces();
  const std::int32_t step = steps[row];
  if (step < 1) return;
  if (threadIdx.x == 0)
    shared.set(settings.beta1, settings.beta2, settings.eps, 1.0 - pow(settings.beta1, static_cast<double>(step)),
               1.0 - pow(settings.beta2, static_cast<double>(step)), settings.grad_scale, settings.lr, 0.0);
  __syncthreads();
  const AdamConstants c = shared;
  t.for_numbers(row, block % t.pieces(), [&](i64, i64 at) {
    float w = t.w[at], m = t.m[at], v = t.v[at];
    c.step(t.grad[at], w, m, v);
    t.put(at, w);
    t.m[at] = m;
    t.v[at] = v;
  });
}

// launch(batch) for all adapters, a block for each piece of each row
template <class S, class F>
void for_adapters(std::span<const AdapterRows> adapters, F&& launch) {
  in_batches(
      adapters,
      [](const AdapterRows& t) {
        return AdapterEntry<S>{t.w.as<float>(),
                               t.grad.as<float>(),
                               t.m.as<float>(),
                               t.v.as<float>(),
                               t.copy.as<S>(),
                               t.w.shape[1],
                               t.a_size,
                               t.bound,
                               {t.streams[0], t.streams[1]},
                               t.products};
      },
      [&](const AdapterEntry<S>& t) { return adapters.front().w.shape[0] * t.pieces(); }, launch);
}

using AverageElements = Elements<4>;

// y ← a·x + b·y. Memory-bound: 2 reads, 1 write.
__global__ void __launch_bounds__(kThreads)
    average(float a, const float* x, float b, float* y, i64 size, const StepValues* gate) {
  const i64 begin = blockIdx.x * AverageElements::kChunk, left = size - begin;
  AverageElements from, to;
  from.load(x + begin, left);
  to.load(y + begin, left);
  if (gate && gate->stopped) return;
#pragma unroll
  for (int i = 0; i < AverageElements::kCount; ++i) to.x[i] = a * from.x[i] + b * to.x[i];
  to.store(y + begin, left);
}

// ---- Muon. Matrices of one wide shape go through Newton–Schulz together.

// `count` matrices X [r, c], r ≤ c, that are the updates of weights [r, c], or [c, r] where `tall`.
struct Wide {
  static constexpr int kMatrices = 120;
  struct Matrix {
    float* w;
    const float* grad;
    float* momentum;
  };
  Matrix matrices[kMatrices];
  bool tall[kMatrices];
  int count = 0;
  int r = 0, c = 0;

  Wide() = default;
  Wide(i64 rows, i64 cols) : r(static_cast<int>(std::min(rows, cols))), c(static_cast<int>(std::max(rows, cols))) {}
  void add(const Matrix& matrix, i64 rows, i64 cols) {
    matrices[count] = matrix;
    tall[count++] = rows > cols;
  }
};
static_assert(sizeof(Wide) <= kParameterBytes);

// The areas of Newton–Schulz. Both sides of X are padded with zeros to multiples of 8, which its products keep at zero
// and which aligns every row to 16 bytes.
struct NewtonSchulz {
  using Squares = Elements<4>;

  DType dtype;
  i64 r, c, count;  // r and c padded
  i64 size, piece;  // elements of a matrix, and of what one block squares
  int pieces;
  void *x, *next, *gram, *poly;  // count·[r, c] twice, count·[r, r] twice
  double* partials;              // [count, pieces]

  NewtonSchulz(Layout& layout, DType storage, const Wide& wide)
      : dtype(storage),
        r(round_up(wide.r, kVector)),
        c(round_up(wide.c, kVector)),
        count(wide.count),
        size(i64{wide.r} * wide.c),
        piece(round_up((size + kThreads - 1) / kThreads, Squares::kChunk)),
        pieces(static_cast<int>((size + piece - 1) / piece)),
        x(layout.take(dtype, count * r * c)),
        next(layout.take(dtype, count * r * c)),
        gram(layout.take(dtype, count * r * r)),
        poly(layout.take(dtype, count * r * r)),
        partials(layout.take<double>(count * pieces)) {}

  // x ← the quintic of x, `steps` times; its coefficients are Keller Jordan's.
  void iterate(const CudaBackend& backend, int steps) {
    constexpr float a = 3.4445f, b = -4.7750f, q = 2.0315f;
    Gemm square;  // gram = x·xᵀ
    square.transpose_b = true;
    square.m = square.n = r;
    square.k = square.lda = square.ldb = c;
    square.ldd = r;
    square.in = square.out = dtype;
    square.d = gram;
    square.count = count;
    square.a_step = square.b_step = r * c;
    square.d_step = r * r;
    Gemm quartic = square;  // poly = q·gram² + b·gram; the Gram matrix is symmetric: its square is G·Gᵀ
    quartic.k = quartic.lda = quartic.ldb = r;
    quartic.a = quartic.b = quartic.c = gram;
    quartic.d = poly;
    quartic.alpha = q;
    quartic.beta = b;
    quartic.a_step = quartic.b_step = r * r;
    Gemm quintic = quartic;  // next = poly·x + a·x
    quintic.transpose_b = false;
    quintic.n = quintic.ldb = quintic.ldd = c;
    quintic.a = poly;
    quintic.alpha = 1.0f;
    quintic.beta = a;
    quintic.b_step = quintic.d_step = r * c;
    for (int step = 0; step < steps; ++step) {
      square.a = square.b = quintic.b = quintic.c = x;
      quintic.d = next;
      backend.gemm(square);
      backend.gemm(quartic);
      backend.gemm(quintic);
      std::swap(x, next);
    }
  }
};

// What is orthogonalised: with kMuon u = g + μ·m, else the gradient's pointer itself. `momentum` is m after its update.
template <bool kMuon>
struct Update {
  float scale = 1, mu = 0;

  __device__ explicit Update(const StepValues* values) {
    if constexpr (kMuon) {
      scale = static_cast<float>(values->grad_scale);
      mu = static_cast<float>(values->momentum);
    }
  }
  __device__ float momentum(float grad, float before) const { return mu * before + grad * scale; }
  __device__ float operator()(float grad, float momentum) const { return kMuon ? grad * scale + mu * momentum : grad; }
};

// Step 1: m ← μ·m + g, and the sums of squares of u. Memory-bound: 2 reads, 1 write.
template <bool kMuon>
__global__ void __launch_bounds__(kThreads)
    gather_updates(const __grid_constant__ Wide wide, i64 piece, const StepValues* values, double* partials) {
  using Squares = NewtonSchulz::Squares;
  __shared__ double shared[kWarp];
  if (kMuon && !values->finite) return;
  const Update<kMuon> update(values);
  const Wide::Matrix& matrix = wide.matrices[blockIdx.y];
  const i64 size = i64{wide.r} * wide.c, begin = blockIdx.x * piece;
  const i64 end = begin + piece < size ? begin + piece : size;
  double sum = 0;
  for (i64 at = begin; at < end; at += Squares::kChunk) {
    Squares grad, m{};
    grad.load(matrix.grad + at, size - at);
    if constexpr (kMuon) {
      m.load(matrix.momentum + at, size - at);
#pragma unroll
      for (int i = 0; i < Squares::kCount; ++i) m.x[i] = update.momentum(grad.x[i], m.x[i]);
      m.store(matrix.momentum + at, size - at);
    }
#pragma unroll
    for (int i = 0; i < Squares::kCount; ++i) {
      const double u = update(grad.x[i], m.x[i]);
      sum += u * u;
    }
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// A square of X and the square of the weight's shape that it is the update of: a transposition's two sides. It lies in
// shared memory as the weight does; the odd stride spreads columns over the banks.
struct Tile {
  static constexpr int kSide = 64;
  static constexpr int kStride = kSide + 1;
  static constexpr int kVectors = kSide * kSide / kVector / kThreads;  // of X, a thread
  static constexpr int kQuads = kSide * kSide / 4 / kThreads;          // of the weight, a thread

  bool tall;
  int rows, cols;              // of the weight
  int padded_r, padded_c;      // of X
  int x_row, x_col, row, col;  // the corners

  __device__ Tile(const Wide& wide, int x_rows, int x_cols) : padded_r(x_rows), padded_c(x_cols) {
    const int across = (padded_c + kSide - 1) / kSide, index = static_cast<int>(blockIdx.x);
    tall = wide.tall[blockIdx.y];
    rows = tall ? wide.c : wide.r;
    cols = tall ? wide.r : wide.c;
    x_row = index / across * kSide;
    x_col = index % across * kSide;
    row = tall ? x_col : x_row;
    col = tall ? x_row : x_col;
  }

  // Thread's vector v: eight numbers of X from (a, b) of the square on, and where they lie in shared memory.
  static __device__ int vector_row(int v) { return (v * kThreads + threadIdx.x) / (kSide / kVector); }
  static __device__ int vector_col(int v) { return (v * kThreads + threadIdx.x) % (kSide / kVector) * kVector; }
  __device__ bool holds(int a, int b) const { return x_row + a < padded_r && x_col + b < padded_c; }
  __device__ i64 x_index(int a, int b) const {
    return (i64{blockIdx.y} * padded_r + x_row + a) * padded_c + (x_col + b);
  }
  __device__ int shared_index(int a, int b) const { return tall ? b * kStride + a : a * kStride + b; }

  // Thread's quad q: four neighbours of a row of the weight's square.
  static __device__ int quad_row(int q) { return (q * kThreads + threadIdx.x) / (kSide / 4); }
  static __device__ int quad_col(int q) { return (q * kThreads + threadIdx.x) % (kSide / 4) * 4; }

  __device__ float4 load_quad(const float* from, int q) const {
    const int i = row + quad_row(q), j = col + quad_col(q);
    if (i >= rows || j >= cols) return make_float4(0, 0, 0, 0);
    const float* at = from + (i64{i} * cols + j);
    if (cols % 4 == 0) return *reinterpret_cast<const float4*>(at);
    return make_float4(at[0], j + 1 < cols ? at[1] : 0, j + 2 < cols ? at[2] : 0, j + 3 < cols ? at[3] : 0);
  }
  __device__ void store_quad(float* to, int q, const float4& x) const {
    const int i = row + quad_row(q), j = col + quad_col(q);
    if (i >= rows || j >= cols) return;
    float* at = to + (i64{i} * cols + j);
    if (cols % 4 == 0) {
      *reinterpret_cast<float4*>(at) = x;
    } else {
      at[0] = x.x;
      if (j + 1 < cols) at[1] = x.y;
      if (j + 2 < cols) at[2] = x.z;
      if (j + 3 < cols) at[3] = x.w;
    }
  }
};

// Step 2: X = u/(‖u‖ + 1e−7), lying wide and padded. Memory-bound: 2 reads, 1 write of S.
template <class S, bool kMuon>
__global__ void __launch_bounds__(kThreads)
    normalize_updates(const __grid_constant__ Wide wide, int padded_r, int padded_c, const double* partials, int pieces,
                      const StepValues* values, S* x) {
  __shared__ float square[Tile::kSide * Tile::kStride];
  __shared__ double shared[kWarp];
  if (kMuon && !values->finite) return;
  const Update<kMuon> update(values);
  const Wide::Matrix& matrix = wide.matrices[blockIdx.y];
  const Tile tile(wide, padded_r, padded_c);
  float4 grad[Tile::kQuads], m[Tile::kQuads];
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) {
    grad[q] = tile.load_quad(matrix.grad, q);
    m[q] = kMuon ? tile.load_quad(matrix.momentum, q) : make_float4(0, 0, 0, 0);
  }
  const bool mine = static_cast<int>(threadIdx.x) < pieces;
  const double squares = block_sum(mine ? partials[blockIdx.y * pieces + threadIdx.x] : 0.0, shared);
  const float inverse = static_cast<float>(1.0 / (sqrt(squares) + 1e-7));
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) {
    float* to = square + Tile::quad_row(q) * Tile::kStride + Tile::quad_col(q);
    to[0] = update(grad[q].x, m[q].x) * inverse;
    to[1] = update(grad[q].y, m[q].y) * inverse;
    to[2] = update(grad[q].z, m[q].z) * inverse;
    to[3] = update(grad[q].w, m[q].w) * inverse;
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    const int a = Tile::vector_row(v), b = Tile::vector_col(v);
    if (!tile.holds(a, b)) continue;
    Vector8 numbers;
#pragma unroll
    for (int i = 0; i < kVector; ++i) numbers.x[i] = square[tile.shared_index(a, b + i)];
    store8(x + tile.x_index(a, b), numbers);
  }
}

// Step 3, after the iterations: w ← w·(1 − lr·wd) − lr·√max(1, rows/cols)·X, or w ← X. Memory-bound: 2 reads, 1 write.
template <class S, bool kMuon>
__global__ void __launch_bounds__(kThreads) apply_updates(const __grid_constant__ Wide wide, int padded_r, int padded_c,
                                                          const S* x, const StepValues* values, double tall_stretch) {
  __shared__ float square[Tile::kSide * Tile::kStride];
  if (kMuon && !values->finite) return;
  const Wide::Matrix& matrix = wide.matrices[blockIdx.y];
  const Tile tile(wide, padded_r, padded_c);
  float4 w[Tile::kQuads];
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) w[q] = kMuon ? tile.load_quad(matrix.w, q) : make_float4(0, 0, 0, 0);
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    const int a = Tile::vector_row(v), b = Tile::vector_col(v);
    if (!tile.holds(a, b)) continue;
    const Vector8 numbers = load8(x + tile.x_index(a, b));
#pragma unroll
    for (int i = 0; i < kVector; ++i) square[tile.shared_index(a, b + i)] = numbers.x[i];
  }
  __syncthreads();
  float rate = -1, keep = 0;
  if constexpr (kMuon) {
    const double lr = values->lr[kMatrix];
    rate = static_cast<float>(tile.tall ? lr * tall_stretch : lr);
    keep = static_cast<float>(1.0 - lr * values->weight_decay[kMatrix]);
  }
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) {
    const float* u = square + Tile::quad_row(q) * Tile::kStride + Tile::quad_col(q);
    tile.store_quad(matrix.w, q,
                    make_float4(w[q].x * keep - rate * u[0], w[q].y * keep - rate * u[1], w[q].z * keep - rate * u[2],
                                w[q].w * keep - rate * u[3]));
  }
}

// With values: Muon's whole step of these matrices. Without: w = NS5(grad).
template <bool kMuon>
void orthogonalize(const CudaBackend& backend, const Wide& wide, int steps, const StepValues* values, void* scratch) {
  Layout layout(scratch);
  NewtonSchulz ns(layout, backend.dtype(), wide);
  const auto r = static_cast<int>(ns.r), c = static_cast<int>(ns.c);
  const auto count = static_cast<unsigned>(wide.count);
  const dim3 pieces(static_cast<unsigned>(ns.pieces), count);
  const dim3 tiles(blocks_for(r, Tile::kSide) * blocks_for(c, Tile::kSide), count);
  gather_updates<kMuon><<<pieces, kThreads, 0, backend.stream()>>>(wide, ns.piece, values, ns.partials);
  PGOLF_LAUNCHED("gather_updates");
  with_storage(backend.dtype(), [&](auto storage) {
    using S = decltype(storage);
    normalize_updates<S, kMuon>
        <<<tiles, kThreads, 0, backend.stream()>>>(wide, r, c, ns.partials, ns.pieces, values, static_cast<S*>(ns.x));
    PGOLF_LAUNCHED("normalize_updates");
    ns.iterate(backend, steps);
    const double tall_stretch = std::sqrt(static_cast<double>(wide.c) / static_cast<double>(wide.r));
    apply_updates<S, kMuon>
        <<<tiles, kThreads, 0, backend.stream()>>>(wide, r, c, static_cast<const S*>(ns.x), values, tall_stretch);
    PGOLF_LAUNCHED("apply_updates");
  });
}

// Calls body(wide) for every wide shape among the tensors, with all of its matrices or kMatrices at a time.
template <class F>
void for_wide_shapes(std::span<const MuonTensor> tensors, F&& body) {
  const auto same = [](const MuonTensor& a, const MuonTensor& b) {
    return std::minmax(a.w.shape[0], a.w.shape[1]) == std::minmax(b.w.shape[0], b.w.shape[1]);
  };
  for (auto first = tensors.begin(); first != tensors.end(); ++first) {
    if (first->w.size() == 0) continue;
    if (std::any_of(tensors.begin(), first, [&](const MuonTensor& t) { return same(t, *first); })) continue;
    Wide wide(first->w.shape[0], first->w.shape[1]);
    for (auto t = first; t != tensors.end(); ++t) {
      if (!same(*t, *first)) continue;
      if (wide.count == Wide::kMatrices) {
        body(wide);
        wide.count = 0;
      }
      wide.add({t->w.as<float>(), t->grad.as<float>(), t->momentum.as<float>()}, t->w.shape[0], t->w.shape[1]);
    }
    body(wide);
  }
}

std::size_t scratch_bytes(DType storage, const Wide& wide) {
  Layout layout;
  NewtonSchulz(layout, storage, wide);
  return layout.used();
}

Wide single(const TensorView& u, const TensorView& out) {
  Wide wide(u.shape[0], u.shape[1]);
  wide.add({out.as<float>(), u.as<float>(), nullptr}, u.shape[0], u.shape[1]);
  return wide;
}

}  // namespace

void CudaBackend::grad_norm(std::span<const TensorView> grads, StepValues* values) {
  PGOLF_CUDA(cudaMemsetAsync(partials_, 0, kPartials * sizeof(double), stream()));
  in_batches(
      grads, [](const TensorView& t) { return Gradient{t.as<float>(), t.size()}; },
      [](const Gradient& g) { return (g.size + SumElements::kChunk - 1) / SumElements::kChunk; },
      [&](const Batch<Gradient>& batch) {
        sum_squares<<<kPartials, kThreads, 0, stream()>>>(batch, partials_);
        PGOLF_LAUNCHED("sum_squares");
      });
  finish_norm<<<1, kPartials, 0, stream()>>>(partials_, values);
  PGOLF_LAUNCHED("finish_norm");
}

void CudaBackend::add_sum(const TensorView& t, double* sum) {
  if (t.size() == 0) return;
  const unsigned blocks = std::min<unsigned>(kPartials, blocks_for(t.size(), SumElements::kChunk));
  sum_elements<<<blocks, kThreads, 0, stream()>>>(t.as<float>(), t.size(), partials_);
  PGOLF_LAUNCHED("sum_elements");
  add_partials<<<1, kPartials, 0, stream()>>>(partials_, static_cast<int>(blocks), sum);
  PGOLF_LAUNCHED("add_partials");
}

void CudaBackend::adam(std::span<const AdamTensor> tensors, const StepValues* values) {
  in_batches(
      tensors,
      [](const AdamTensor& t) {
        return AdamEntry{t.w.as<float>(), t.grad.as<float>(), t.m.as<float>(), t.v.as<float>(), t.w.size(), t.group};
      },
      [](const AdamEntry& e) { return (e.size + AdamElements::kChunk - 1) / AdamElements::kChunk; },
      [&](const Batch<AdamEntry>& batch) {
        adam_update<<<batch.blocks, kThreads, 0, stream()>>>(batch, values);
        PGOLF_LAUNCHED("adam_update");
      });
}

std::size_t CudaBackend::muon_scratch(std::span<const MuonTensor> tensors) const {
  std::size_t worst = 0;
  for_wide_shapes(tensors, [&](const Wide& wide) { worst = std::max(worst, scratch_bytes(storage_, wide)); });
  return worst;
}

void CudaBackend::muon(std::span<const MuonTensor> tensors, int ns_steps, const StepValues* values, void* scratch) {
  for_wide_shapes(tensors, [&](const Wide& wide) { orthogonalize<true>(*this, wide, ns_steps, values, scratch); });
}

std::size_t CudaBackend::newton_schulz_scratch(const TensorView& u) const {
  return u.size() == 0 ? 0 : scratch_bytes(storage_, single(u, u));
}

void CudaBackend::newton_schulz(const TensorView& u, const TensorView& out, int steps, void* scratch) {
  if (u.size() == 0) return;
  orthogonalize<false>(*this, single(u, out), steps, nullptr, scratch);
}

void CudaBackend::adapters_begin(std::span<const AdapterRows> adapters, const TensorView& documents,
                                 std::uint64_t seed) {
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    for_adapters<S>(adapters, [&](const Batch<AdapterEntry<S>>& batch) {
      begin_adapters<S><<<batch.blocks, kThreads, 0, stream()>>>(batch, documents.as<std::int32_t>(), seed);
      PGOLF_LAUNCHED("begin_adapters");
    });
  });
}

void CudaBackend::adapters_step(std::span<const AdapterRows> adapters, const TensorView& steps,
                                const AdapterAdam& settings) {
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    for_adapters<S>(adapters, [&](const Batch<AdapterEntry<S>>& batch) {
      step_adapters<S><<<batch.blocks, kThreads, 0, stream()>>>(batch, steps.as<std::int32_t>(), settings);
      PGOLF_LAUNCHED("step_adapters");
    });
  });
}

void CudaBackend::axpby(double a, const TensorView& x, double b, const TensorView& y, const StepValues* gate) {
  if (x.size() == 0) return;
  average<<<blocks_for(x.size(), AverageElements::kChunk), kThreads, 0, stream()>>>(
      static_cast<float>(a), x.as<float>(), static_cast<float>(b), y.as<float>(), x.size(), gate);
  PGOLF_LAUNCHED("average");
}

}  // namespace pgolf::cuda
