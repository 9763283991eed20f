// Gradient norm, AdamW, Muon with Newton–Schulz, averaging.  docs/spec.md §3
#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "cuda/batch.cuh"
#include "cuda/sm90/newton_schulz.cuh"
#include "grad_norm.h"

namespace pgolf::cuda {
namespace {

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

// ---- Muon. All matrices go through each step of it together.

using Squares = Elements<4>;

// A weight [rows, cols] and its update X, which lies wide, [r, c] with r ≤ c: transposed where the weight is tall. Both
// sides of X are padded with zeros to multiples of 8, which its products keep at zero and which aligns every row to 16
// bytes.
struct Matrix {
  float* w;
  const float* grad;
  float* momentum;
  void* x;           // S [padded_r, padded_c]
  double* partials;  // [pieces]
  int rows, cols;

  __host__ __device__ bool tall() const { return rows > cols; }
  __host__ __device__ int padded_r() const { return padded(tall() ? cols : rows); }
  __host__ __device__ int padded_c() const { return padded(tall() ? rows : cols); }
  __host__ __device__ i64 size() const { return i64{rows} * cols; }
  // Elements that one block squares, and how many blocks that takes.
  __host__ __device__ i64 piece() const {
    return ((size() + kThreads - 1) / kThreads + Squares::kChunk - 1) / Squares::kChunk * Squares::kChunk;
  }
  __host__ __device__ int pieces() const { return static_cast<int>((size() + piece() - 1) / piece()); }

 private:
  __host__ __device__ static int padded(int side) { return (side + kVector - 1) / kVector * kVector; }
};
using Matrices = Batch<Matrix>;

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

  __device__ Tile(const Matrix& matrix, unsigned block)
      : tall(matrix.tall()),
        rows(matrix.rows),
        cols(matrix.cols),
        padded_r(matrix.padded_r()),
        padded_c(matrix.padded_c()) {
    const int across = (padded_c + kSide - 1) / kSide, index = static_cast<int>(block);
    x_row = index / across * kSide;
    x_col = index % across * kSide;
    row = tall ? x_col : x_row;
    col = tall ? x_row : x_col;
  }

  static i64 count(const Matrix& matrix) {
    return i64{blocks_for(matrix.padded_r(), kSide)} * blocks_for(matrix.padded_c(), kSide);
  }

  // Thread's vector v: eight numbers of X from (a, b) of the square on, and where they lie in shared memory.
  static __device__ int vector_row(int v) { return (v * kThreads + threadIdx.x) / (kSide / kVector); }
  static __device__ int vector_col(int v) { return (v * kThreads + threadIdx.x) % (kSide / kVector) * kVector; }
  __device__ bool holds(int a, int b) const { return x_row + a < padded_r && x_col + b < padded_c; }
  __device__ i64 x_index(int a, int b) const { return i64{x_row + a} * padded_c + (x_col + b); }
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

// All matrices of a launch that makes X, and the blocks at which its steps begin.
struct Preparation {
  static constexpr int kMatrices = 70;
  Matrix matrices[kMatrices];
  unsigned first[2 * kMatrices];
  int count = 0;
  unsigned blocks = 0;

  void number() {
    blocks = 0;
    for (int i = 0; i < 2 * count; ++i) {
      const PreparationStep step = preparation_step(i, count);
      const Matrix& matrix = matrices[step.matrix];
      first[i] = blocks;
      blocks += step.normalizes ? static_cast<unsigned>(Tile::count(matrix)) : static_cast<unsigned>(matrix.pieces());
    }
  }
};
static_assert(sizeof(Preparation) <= kParameterBytes);

// Newton–Schulz: its areas, and the iterations on all matrices at once.
class NewtonSchulz {
 public:
  NewtonSchulz(Layout& layout, DType storage, std::span<const MuonTensor> tensors) : dtype_(storage) {
    for (const MuonTensor& t : tensors) {
      if (t.w.size() == 0) continue;
      Matrix matrix{t.w.as<float>(),
                    t.grad.as<float>(),
                    t.momentum.as<float>(),
                    nullptr,
                    nullptr,
                    static_cast<int>(t.w.shape[0]),
                    static_cast<int>(t.w.shape[1])};
      matrix.partials = layout.take<double>(matrix.pieces());
      const i64 r = matrix.padded_r(), c = matrix.padded_c();
      auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.r == r && g.c == c; });
      if (group == groups_.end()) group = groups_.insert(group, Group{.count = 0, .r = r, .c = c});
      placed_.push_back({matrix, static_cast<std::size_t>(group - groups_.begin()), group->count++});
    }
    states_ = static_cast<i64>(groups_.size() + placed_.size() + preparations() + placed_.size());
    state_ = layout.take<unsigned>(states_);
    for (Group& g : groups_) {
      g.x = layout.take(dtype_, g.count * g.r * g.c);
      g.next = layout.take(dtype_, g.count * g.r * g.c);
      g.gram = layout.take(dtype_, g.count * g.r * g.r);
      g.poly = layout.take(dtype_, g.count * g.r * g.r);
    }
  }

  // Calls launch(preparation, counters) until every matrix was in one; first of all, as it sets all counters to 0.
  template <class F>
  void prepare(cudaStream_t stream, F&& launch) const {
    if (placed_.empty()) return;
    PGOLF_CUDA(cudaMemsetAsync(state_, 0, static_cast<std::size_t>(states_) * sizeof *state_, stream));
    unsigned* counters = state_ + groups_.size() + placed_.size();
    Preparation preparation;
    for (const Placed& p : placed_) {
      preparation.matrices[preparation.count++] = with_x(p);
      if (preparation.count < Preparation::kMatrices && &p != &placed_.back()) continue;
      preparation.number();
      launch(preparation, counters);
      counters += 1 + preparation.count;
      preparation.count = 0;
    }
  }

  // Calls launch(batch) until every matrix was in one, with blocks_of(matrix) blocks each.
  template <class BlocksOf, class F>
  void in_all(BlocksOf&& blocks_of, F&& launch) const {
    in_batches(placed_, [&](const Placed& p) { return with_x(p); }, blocks_of, launch);
  }

  // x ← the quintic of x, `steps` times.
  void iterate(const CudaBackend& backend, int steps) {
    if (groups_.empty()) return;
    with_storage(dtype_, [&](auto storage) {
      using S = decltype(storage);
      if constexpr (sizeof(S) == 2)
        if (backend.path() >= Path::sm90)
          return sm90::launch_newton_schulz<S>(backend, groups_, steps, a, b, q, state_);
      for (const Group& g : groups_) iterate_group(backend, g, steps);
    });
    if (steps % 2 != 0)
      for (Group& g : groups_) std::swap(g.x, g.next);
  }

 private:
  static constexpr float a = 3.4445f, b = -4.7750f, q = 2.0315f;  // Keller Jordan's

  using Group = sm90::WideMatrices;
  struct Placed {
    Matrix matrix;
    std::size_t group;
    i64 place;
  };

  std::size_t preparations() const { return (placed_.size() + Preparation::kMatrices - 1) / Preparation::kMatrices; }

  Matrix with_x(const Placed& p) const {
    const Group& g = groups_[p.group];
    Matrix matrix = p.matrix;
    matrix.x = static_cast<char*>(g.x) + static_cast<std::size_t>(p.place * g.r * g.c) * size_of(dtype_);
    return matrix;
  }

  void iterate_group(const CudaBackend& backend, const Group& g, int steps) const {
    Gemm square;  // gram = x·xᵀ
    square.transpose_b = true;
    square.m = square.n = g.r;
    square.k = square.lda = square.ldb = g.c;
    square.ldd = g.r;
    square.in = square.out = dtype_;
    square.d = g.gram;
    square.count = g.count;
    square.a_step = square.b_step = g.r * g.c;
    square.d_step = g.r * g.r;
    Gemm quartic = square;  // poly = q·gram² + b·gram; the Gram matrix is symmetric: its square is G·Gᵀ
    quartic.k = quartic.lda = quartic.ldb = g.r;
    quartic.a = quartic.b = quartic.c = g.gram;
    quartic.d = g.poly;
    quartic.alpha = q;
    quartic.beta = b;
    quartic.a_step = quartic.b_step = g.r * g.r;
    Gemm quintic = quartic;  // next = poly·x + a·x
    quintic.transpose_b = false;
    quintic.n = quintic.ldb = quintic.ldd = g.c;
    quintic.a = g.poly;
    quintic.alpha = 1.0f;
    quintic.beta = a;
    quintic.b_step = quintic.d_step = g.r * g.c;
    for (int step = 0; step < steps; ++step) {
      square.a = square.b = quintic.b = quintic.c = step % 2 == 0 ? g.x : g.next;
      quintic.d = step % 2 == 0 ? g.next : g.x;
      backend.gemm(square);
      backend.gemm(quartic);
      backend.gemm(quintic);
    }
  }

  DType dtype_;
  std::vector<Placed> placed_;
  std::vector<Group> groups_;
  unsigned* state_ = nullptr;  // zeros at first: launch_newton_schulz's, then those of prepare's launches
  i64 states_ = 0;
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

// A piece of a matrix: m ← μ·m + g, and the sum of squares of u. Memory-bound: 2 reads, 1 write.
template <bool kMuon>
__device__ __forceinline__ void gather_piece(const Matrix& matrix, unsigned number, const Update<kMuon>& update,
                                             double* shared, unsigned* gathered) {
  const i64 size = matrix.size(), piece = matrix.piece(), begin = number * piece;
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
  sum = block_sum(sum, shared);  // and all have stored
  if (threadIdx.x != 0) return;
  matrix.partials[number] = sum;
  add_done(gathered, 1);
}

// A tile of X = u/(‖u‖ + 1e−7), lying wide and padded, once all pieces are gathered. 2 reads, of the L2 cache where the
// pieces were gathered a moment ago, and 1 write of S.
template <class S, bool kMuon>
__device__ __forceinline__ void normalize_tile(const Matrix& matrix, unsigned number, const Update<kMuon>& update,
                                               double* shared, const unsigned* gathered) {
  __shared__ float square[Tile::kSide * Tile::kStride];
  const Tile tile(matrix, number);
  float4 grad[Tile::kQuads], m[Tile::kQuads];
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) grad[q] = tile.load_quad(matrix.grad, q);
  if (threadIdx.x == 0) wait_until(gathered, static_cast<unsigned>(matrix.pieces()));
  __syncthreads();
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) m[q] = kMuon ? tile.load_quad(matrix.momentum, q) : make_float4(0, 0, 0, 0);
  const bool mine = static_cast<int>(threadIdx.x) < matrix.pieces();
  const double squares = block_sum(mine ? matrix.partials[threadIdx.x] : 0.0, shared);
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
    store8(static_cast<S*>(matrix.x) + tile.x_index(a, b), numbers);
  }
}

// Step 1, both of these. A block's number is the order in which it begins to run, not its place in the grid: a tile
// waits for pieces with smaller numbers, which then run and wait for nothing. counters: the blocks that have begun, and
// of each matrix the pieces gathered.
template <class S, bool kMuon>
__global__ void __launch_bounds__(kThreads)
    prepare_updates(const __grid_constant__ Preparation preparation, const StepValues* values, unsigned* counters) {
  __shared__ double shared[kWarp];
  __shared__ unsigned own;
  if (kMuon && !values->finite) return;
  const Update<kMuon> update(values);
  if (threadIdx.x == 0) own = atomicAdd(counters, 1u);
  __syncthreads();
  const int index = last_at_most(preparation.first, 2 * preparation.count, own);
  const PreparationStep step = preparation_step(index, preparation.count);
  const unsigned number = own - preparation.first[index];
  const Matrix& matrix = preparation.matrices[step.matrix];
  unsigned* const gathered = counters + 1 + step.matrix;
  if (step.normalizes)
    normalize_tile<S, kMuon>(matrix, number, update, shared, gathered);
  else
    gather_piece<kMuon>(matrix, number, update, shared, gathered);
}

// Step 2, after the iterations: w ← w·(1 − lr·wd) − lr·√max(1, rows/cols)·X, or w ← X. Memory-bound: 2 reads, 1 write.
template <class S, bool kMuon>
__global__ void __launch_bounds__(kThreads)
    apply_updates(const __grid_constant__ Matrices matrices, const StepValues* values) {
  __shared__ float square[Tile::kSide * Tile::kStride];
  __shared__ float rate, keep;
  if (kMuon && !values->finite) return;
  const int index = matrices.entry_of(blockIdx.x);
  const Matrix& matrix = matrices.entries[index];
  const Tile tile(matrix, blockIdx.x - matrices.first[index]);
  float4 w[Tile::kQuads];
#pragma unroll
  for (int q = 0; q < Tile::kQuads; ++q) w[q] = kMuon ? tile.load_quad(matrix.w, q) : make_float4(0, 0, 0, 0);
#pragma unroll
  for (int v = 0; v < Tile::kVectors; ++v) {
    const int a = Tile::vector_row(v), b = Tile::vector_col(v);
    if (!tile.holds(a, b)) continue;
    const Vector8 numbers = load8(static_cast<const S*>(matrix.x) + tile.x_index(a, b));
#pragma unroll
    for (int i = 0; i < kVector; ++i) square[tile.shared_index(a, b + i)] = numbers.x[i];
  }
  if (threadIdx.x == 0) {
    if constexpr (kMuon) {
      const double lr = values->lr[kMatrix];
      rate = static_cast<float>(tile.tall ? lr * sqrt(static_cast<double>(tile.rows) / tile.cols) : lr);
      keep = static_cast<float>(1.0 - lr * values->weight_decay[kMatrix]);
    } else {
      rate = -1;
      keep = 0;
    }
  }
  __syncthreads();
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
void orthogonalize(const CudaBackend& backend, std::span<const MuonTensor> tensors, int steps, const StepValues* values,
                   void* scratch) {
  Layout layout(scratch);
  NewtonSchulz ns(layout, backend.dtype(), tensors);
  const cudaStream_t stream = backend.stream();
  with_storage(backend.dtype(), [&](auto storage) {
    using S = decltype(storage);
    ns.prepare(stream, [&](const Preparation& preparation, unsigned* counters) {
      prepare_updates<S, kMuon><<<preparation.blocks, kThreads, 0, stream>>>(preparation, values, counters);
      PGOLF_LAUNCHED("prepare_updates");
    });
    ns.iterate(backend, steps);
    ns.in_all(Tile::count, [&](const Matrices& batch) {
      apply_updates<S, kMuon><<<batch.blocks, kThreads, 0, stream>>>(batch, values);
      PGOLF_LAUNCHED("apply_updates");
    });
  });
}

std::size_t scratch_bytes(DType storage, std::span<const MuonTensor> tensors) {
  Layout layout;
  NewtonSchulz(layout, storage, tensors);
  return layout.used();
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
  return scratch_bytes(storage_, tensors);
}

void CudaBackend::muon(std::span<const MuonTensor> tensors, int ns_steps, const StepValues* values, void* scratch) {
  orthogonalize<true>(*this, tensors, ns_steps, values, scratch);
}

std::size_t CudaBackend::newton_schulz_scratch(const TensorView& u) const {
  const MuonTensor single{u, u, {}};
  return scratch_bytes(storage_, {&single, 1});
}

void CudaBackend::newton_schulz(const TensorView& u, const TensorView& out, int steps, void* scratch) {
  const MuonTensor single{out, u, {}};
  orthogonalize<false>(*this, {&single, 1}, steps, nullptr, scratch);
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
