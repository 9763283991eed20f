// Muon: momentum, normalised updates, their orthogonalisation by Newton–Schulz iterations, and the step. All matrices
// go through each of these together.  docs/spec.md §3
#include <cmath>

#include "cuda/muon_matrices.cuh"
#include "cuda/newton_schulz.cuh"

namespace pgolf::cuda {
namespace {

// What is orthogonalised: with kMuon u = g + μ·m, else the gradient's pointer itself. `momentum` is m after its update.
template <bool kMuon>
struct MuonUpdate {
  float scale = 1, mu = 0;

  __device__ explicit MuonUpdate(const StepValues* values) {
    if constexpr (kMuon) {
      scale = static_cast<float>(values->grad_scale);
      mu = static_cast<float>(values->momentum);
    }
  }
  __device__ float momentum(float grad, float before) const { return mu * before + grad * scale; }
  __device__ float operator()(float grad, float momentum) const { return kMuon ? grad * scale + mu * momentum : grad; }
};

// A piece of a matrix: m ← μ·m + g, and the sum of squares of u. Memory-bound: 2 reads, 1 write. gather_rows takes
// whole rows: the squares are those of normalised rows, whose factors are kept.
template <bool kMuon>
__device__ __forceinline__ void gather_piece(const MuonMatrix& matrix, unsigned number, const MuonUpdate<kMuon>& update,
                                             double* shared, unsigned* gathered) {
  const i64 size = matrix.size(), piece = matrix.piece(false), begin = number * piece;
  const i64 end = begin + piece < size ? begin + piece : size;
  double sum = 0;
  for (i64 at = begin; at < end; at += MuonElements::kChunk) {
    MuonElements grad, m{};
    grad.load(matrix.grad + at, size - at);
    if constexpr (kMuon) {
      m.load(matrix.momentum + at, size - at);
#pragma unroll
      for (int i = 0; i < MuonElements::kCount; ++i) m.x[i] = update.momentum(grad.x[i], m.x[i]);
      m.store(matrix.momentum + at, size - at);
    }
#pragma unroll
    for (int i = 0; i < MuonElements::kCount; ++i) {
      const double u = update(grad.x[i], m.x[i]);
      sum += u * u;
    }
  }
  sum = block_sum(sum, shared);  // and all have stored
  if (threadIdx.x != 0) return;
  matrix.partials[number] = sum;
  release_increment(gathered, 1);
}

template <bool kMuon>
__device__ __forceinline__ void gather_rows(const MuonMatrix& matrix, unsigned number, const MuonUpdate<kMuon>& update,
                                            double* shared, unsigned* gathered) {
  const int count = static_cast<int>(matrix.piece(true) / matrix.cols), begin = static_cast<int>(number) * count;
  const int end = begin + count < matrix.rows ? begin + count : matrix.rows;
  double normed = 0;
  for (int row = begin; row < end; ++row) {
    double sum = 0;
    for (int column = static_cast<int>(threadIdx.x); column < matrix.cols; column += kThreads) {
      const i64 at = i64{row} * matrix.cols + column;
      const float grad = matrix.grad[at], m = update.momentum(grad, matrix.momentum[at]);
      matrix.momentum[at] = m;
      const double u = update(grad, m);
      sum += u * u;
    }
    __syncthreads();  // all have read the sum before
    sum = block_sum(sum, shared);
    const float factor = static_cast<float>(1.0 / fmax(sqrt(sum), 1e-7));
    if (threadIdx.x == 0) matrix.row_factors()[row] = factor;
    normed += sum * factor * factor;
  }
  __syncthreads();  // all have stored
  if (threadIdx.x != 0) return;
  matrix.partials[number] = normed;
  release_increment(gathered, 1);
}

// A tile of X = u/(‖u‖ + 1e−7), lying wide and padded, once all pieces are gathered. 2 reads, from L2 where the pieces
// were gathered a moment ago, and 1 write of S.
template <class S, bool kMuon>
__device__ __forceinline__ void normalize_tile(const MuonMatrix& matrix, unsigned number,
                                               const MuonUpdate<kMuon>& update, bool normalize_rows, double* shared,
                                               const unsigned* gathered) {
  __shared__ float square[MuonTile::kSide * MuonTile::kStride];
  const MuonTile tile(matrix, number);
  float4 grad[MuonTile::kQuads], m[MuonTile::kQuads];
#pragma unroll
  for (int q = 0; q < MuonTile::kQuads; ++q) grad[q] = tile.load_quad(matrix.grad, q);
  if (threadIdx.x == 0) acquire_at_least(gathered, static_cast<unsigned>(matrix.pieces(normalize_rows)));
  __syncthreads();
#pragma unroll
  for (int q = 0; q < MuonTile::kQuads; ++q)
    m[q] = kMuon ? tile.load_quad(matrix.momentum, q) : make_float4(0, 0, 0, 0);
  const bool mine = static_cast<int>(threadIdx.x) < matrix.pieces(normalize_rows);
  const double squares = block_sum(mine ? matrix.partials[threadIdx.x] : 0.0, shared);
  const float whole = static_cast<float>(1.0 / (sqrt(squares) + 1e-7));
#pragma unroll
  for (int q = 0; q < MuonTile::kQuads; ++q) {
    const int row = tile.row + MuonTile::quad_row(q);
    const float inverse = normalize_rows && row < tile.rows ? whole * matrix.row_factors()[row] : whole;
    float* to = square + MuonTile::quad_row(q) * MuonTile::kStride + MuonTile::quad_col(q);
    to[0] = update(grad[q].x, m[q].x) * inverse;
    to[1] = update(grad[q].y, m[q].y) * inverse;
    to[2] = update(grad[q].z, m[q].z) * inverse;
    to[3] = update(grad[q].w, m[q].w) * inverse;
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < MuonTile::kVectors; ++v) {
    const int a = MuonTile::vector_row(v), b = MuonTile::vector_col(v);
    if (!tile.holds(a, b)) continue;
    Vector8 numbers;
#pragma unroll
    for (int i = 0; i < kVector; ++i) numbers.x[i] = square[tile.shared_index(a, b + i)];
    store8(static_cast<S*>(matrix.x) + tile.x_index(a, b), numbers);
  }
}

// Step 1, both of these. A block takes its number from a counter as it starts, not from its place in the grid: a tile
// waits for pieces with smaller numbers, whose blocks already run and wait for nothing, so that there is no deadlock.
// counters: the blocks that have started, and of each matrix the pieces gathered.
template <class S, bool kMuon>
__global__ void __launch_bounds__(kThreads)
    prepare_updates(const __grid_constant__ Preparation preparation, const StepValues* values, unsigned* counters) {
  __shared__ double shared[kWarp];
  __shared__ unsigned own;
  if (kMuon && !values->finite) return;
  const MuonUpdate<kMuon> update(values);
  if (threadIdx.x == 0) own = atomicAdd(counters, 1u);
  __syncthreads();
  const int index = last_at_most(preparation.first, 2 * preparation.count, own);
  const PreparationStep step = preparation_step(index, preparation.count);
  const unsigned number = own - preparation.first[index];
  const MuonMatrix& matrix = preparation.matrices[step.matrix];
  unsigned* const gathered = counters + 1 + step.matrix;
  if (step.normalizes)
    normalize_tile<S, kMuon>(matrix, number, update, preparation.normalize_rows, shared, gathered);
  else if (kMuon && preparation.normalize_rows)
    gather_rows<kMuon>(matrix, number, update, shared, gathered);
  else
    gather_piece<kMuon>(matrix, number, update, shared, gathered);
}

// Step 2, after the iterations: w ← w·(1 − lr·wd) − lr·√max(1, rows/cols)·X, or w ← X. Memory-bound: 2 reads, 1 write.
template <class S, bool kMuon>
__global__ void __launch_bounds__(kThreads)
    apply_updates(const __grid_constant__ MuonMatrices matrices, const StepValues* values) {
  __shared__ float square[MuonTile::kSide * MuonTile::kStride];
  __shared__ float rate, keep;
  if (kMuon && !values->finite) return;
  const int index = matrices.entry_of(blockIdx.x);
  const MuonMatrix& matrix = matrices.entries[index];
  const MuonTile tile(matrix, blockIdx.x - matrices.first[index]);
  float4 w[MuonTile::kQuads];
#pragma unroll
  for (int q = 0; q < MuonTile::kQuads; ++q) w[q] = kMuon ? tile.load_quad(matrix.w, q) : make_float4(0, 0, 0, 0);
#pragma unroll
  for (int v = 0; v < MuonTile::kVectors; ++v) {
    const int a = MuonTile::vector_row(v), b = MuonTile::vector_col(v);
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
  for (int q = 0; q < MuonTile::kQuads; ++q) {
    const float* u = square + MuonTile::quad_row(q) * MuonTile::kStride + MuonTile::quad_col(q);
    tile.store_quad(matrix.w, q,
                    make_float4(w[q].x * keep - rate * u[0], w[q].y * keep - rate * u[1], w[q].z * keep - rate * u[2],
                                w[q].w * keep - rate * u[3]));
  }
}

// With values: Muon's whole step of these matrices. Without: w = the steps of grad/(‖grad‖ + 1e−7).
template <bool kMuon>
void orthogonalize(const CudaBackend& backend, std::span<const MuonTensor> tensors, const MuonRule& rule,
                   const StepValues* values, void* scratch) {
  Layout layout(scratch);
  NewtonSchulz ns(layout, backend.dtype(), tensors);
  const cudaStream_t stream = backend.stream();
  with_storage(backend.dtype(), [&](auto storage) {
    using S = decltype(storage);
    ns.prepare(stream, rule.normalize_rows, [&](const Preparation& preparation, unsigned* counters) {
      prepare_updates<S, kMuon><<<preparation.blocks, kThreads, 0, stream>>>(preparation, values, counters);
      PGOLF_LAUNCHED("prepare_updates");
    });
    ns.iterate(backend, rule.steps);
    ns.in_all(MuonTile::count, [&](const MuonMatrices& batch) {
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

std::size_t CudaBackend::muon_scratch(std::span<const MuonTensor> tensors) const {
  return scratch_bytes(storage_, tensors);
}

void CudaBackend::muon(std::span<const MuonTensor> tensors, const MuonRule& rule, const StepValues* values,
                       void* scratch) {
  orthogonalize<true>(*this, tensors, rule, values, scratch);
}

std::size_t CudaBackend::newton_schulz_scratch(const TensorView& u) const {
  const MuonTensor single{u, u, {}};
  return scratch_bytes(storage_, {&single, 1});
}

void CudaBackend::newton_schulz(const TensorView& u, const TensorView& out, const NewtonSchulzSteps& steps,
                                void* scratch) {
  const MuonTensor single{out, u, {}};
  orthogonalize<false>(*this, {&single, 1}, MuonRule{steps}, nullptr, scratch);
}

}  // namespace pgolf::cuda
