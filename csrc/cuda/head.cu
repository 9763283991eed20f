// Final norm, output GEMM, softcap and cross-entropy, in chunks of rows whose logits stay in L2.
//
// Rounded to S: normed = rms(x); dlogits, the gradient before the softcap; dnormed = dlogits·w; dx. Logits are float32
// and never rounded; the norm's backward uses normed before it is rounded. With adapters: u, du, and dnormed once more,
// before du·a is added.
#include "cuda/adapters.h"
#include "cuda/gemm_args.h"
#include "cuda/row_ops.cuh"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 B, T, d, V, rows, rank, chunk, stride;
  explicit Dims(const Head& op)
      : B(op.x.shape[0]),
        T(op.x.shape[1]),
        d(op.x.shape[2]),
        V(op.w.shape[0]),
        rows(B * (T - op.first)),
        rank(op.adapters ? op.rank : 0),
        chunk(std::min(rows, rank ? sequences_of_chunk() * (rows / B) : rows_of_chunk(V))),
        stride((V + kVector - 1) / kVector * kVector) {}
  Linear linear(DType S, i64 rows_of_chunk, i64 logits_stride) const { return {S, rows_of_chunk, d, V, logits_stride}; }
  Adapters<1> adapters(DType S, i64 rows_of_chunk) const {
    return {S, rows_of_chunk / (rows / B), rows / B, rank, d, {V}};
  }

 private:
  // With adapters chunks are whole sequences, and all of one height: the same bits for a sequence wherever it stands.
  i64 sequences_of_chunk() const {
    i64 sequences = std::clamp<i64>(rows_of_chunk(V) / (rows / B), 1, B);
    while (B % sequences) --sequences;
    return sequences;
  }
  // At most 32 MiB of logits, what an H100's L2 holds beside the operands; a GEMM needs 128 rows. The
  // same in all three operations: how a GEMM sums may depend on its height.
  static i64 rows_of_chunk(i64 V) {
    constexpr i64 kLogits = (i64{32} << 20) / sizeof(float), kLeast = 128, kMost = 16384;
    return std::clamp(kLogits / V / kLeast * kLeast, kLeast, kMost);
  }
};

struct ForwardScratch {
  void* normed;    // [chunk, d]
  float* factors;  // [chunk]
  float* logits;   // [chunk, stride]; not for head_logits, which has its own
  void* u;         // [chunk, rank]
  ForwardScratch(Layout& layout, DType S, const Dims& s, bool own_logits)
      : normed(layout.take(S, s.chunk * s.d)),
        factors(layout.take<float>(s.chunk)),
        logits(layout.take<float>(own_logits ? 0 : s.chunk * s.stride)),
        u(layout.take(S, s.chunk * s.rank)) {}
};

struct BackwardScratch {
  ForwardScratch forward;  // normed gives way to dnormed, and that to normed again
  void *dlogits, *du;      // [chunk, stride], [chunk, rank]
  BackwardScratch(Layout& layout, DType S, const Dims& s)
      : forward(layout, S, s, false),
        dlogits(layout.take(S, s.chunk * s.stride)),
        du(layout.take(S, s.chunk * s.rank)) {}
};

constexpr int kThreads = 256;
constexpr i64 kMaxHeldRow = kMaxTeamRow;  // logits that a block holds in its registers: 8,192

struct Softcap {
  float cap, inverse;
  explicit Softcap(double c) : cap(static_cast<float>(c)), inverse(static_cast<float>(1.0 / c)) {}
  // Not contracted with what follows: a logit is the same number wherever it is read.
  __device__ float operator()(float z) const { return __fmul_rn(cap, tanhf(__fmul_rn(z, inverse))); }
  // Its slope, where it has the value y.
  __device__ float slope(float y) const {
    const float t = y * inverse;
    return 1.0f - t * t;
  }
};

// Memory-bound: 1 read, 1 write, in L2.
__global__ void __launch_bounds__(kThreads) cap_logits(float* logits, i64 count, Softcap softcap) {
  const i64 at = (i64{blockIdx.x} * kThreads + threadIdx.x) * kVector;
  if (at + kVector <= count) {
    Vector8 z = load8<float>(logits + at);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z.x[j] = softcap(z.x[j]);
    store8(logits + at, z);
  } else {
    for (i64 i = at; i < count; ++i) logits[i] = softcap(logits[i]);
  }
}

// What the kernels of the loss read and write. Without dlogits only losses are computed, by the same instructions.
template <class S>
struct Loss {
  const float* logits;  // [rows, stride], before the softcap
  i64 rows, stride;
  int V;
  const std::int32_t* targets;
  Positions positions;
  Softcap softcap;
  float* losses;
  double loss_scale;
  const double* multiplier;  // may be null
  const float* weights;      // [rows] or null: 1
  S* dlogits;                // [rows, stride] or null

  __device__ float scale(i64 row) const {
    const auto scale = static_cast<float>(multiplier ? loss_scale * *multiplier : loss_scale);
    return weights ? scale * weights[row] : scale;
  }
  __device__ int target(i64 row) const { return targets[positions.token(row)]; }

  // Eight logits of a row; −∞ beyond V.
  __device__ Vector8 capped(const float* row, int column) const {
    Vector8 y;
    if (column + kVector <= V) {
      y = load8(row + column);
#pragma unroll
      for (int j = 0; j < kVector; ++j) y.x[j] = softcap(y.x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) y.x[j] = column + j < V ? softcap(row[column + j]) : -INFINITY;
    }
    return y;
  }
  // log Σ exp(y) − y[target]: the two parts of log Σ exp, of which one may be large, stay apart.
  __device__ void store_loss(i64 row, float top, float sum) const {
    losses[row] = logf(sum) + (top - softcap(logits[row * stride + target(row)]));
  }
  // dlogits = scale·(softmax − onehot)·slope; those from V on are never read.
  __device__ void store_gradient(i64 row, int column, const Vector8& y, float top, float over_sum, int at_target,
                                 float factor) const {
    Vector8 g;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float p = expf(y.x[j] - top) * over_sum - (column + j == at_target ? 1.0f : 0.0f);
      g.x[j] = factor * p * softcap.slope(y.x[j]);
    }
    S* to = dlogits + row * stride + column;
    if (column + kVector <= V) {
      store8(to, g);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (column + j < V) to[j] = from_float<S>(g.x[j]);
    }
  }
};

// Losses of rows that teams hold in their registers, and the gradient: logits are read once. The arithmetic, two
// exponentials and a tanh for a logit, takes about as long as the memory.
template <class S, int kVectors>
__global__ void __launch_bounds__(kRowThreads) row_losses(Loss<S> loss, int warps) {
  const Team team(warps);
  const i64 own = team_row(team), row = own < loss.rows ? own : loss.rows - 1;
  const float* z = loss.logits + row * loss.stride;
  Vector8 y[kVectors];
  float top = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= loss.V) break;
    y[v] = loss.capped(z, team.column(v));
#pragma unroll
    for (int j = 0; j < kVector; ++j) top = fmaxf(top, y[v].x[j]);
  }
  top = team.max(top);
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= loss.V) break;
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += expf(y[v].x[j] - top);
  }
  sum = team.sum(sum);
  if (own >= loss.rows) return;
  if (team.thread == 0) loss.store_loss(row, top, sum);
  if (!loss.dlogits) return;
  const float scale = loss.scale(row), over_sum = 1.0f / sum;
  const int target = loss.target(row);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= loss.V) break;
    loss.store_gradient(row, team.column(v), y[v], top, over_sum, target, scale);
  }
}

// The same for longer rows, a block for each: a running maximum and sum for every thread, then logits once more.
template <class S>
__global__ void __launch_bounds__(kRowThreads) long_row_losses(Loss<S> loss) {
  const Team team(kRowWarps);
  const i64 row = blockIdx.x;
  const float* z = loss.logits + row * loss.stride;
  float top = -INFINITY, sum = 0;
#pragma unroll 2
  for (int column = team.column(0); column < loss.V; column += kRowThreads * kVector) {
    const Vector8 y = loss.capped(z, column);
    float higher = top;
#pragma unroll
    for (int j = 0; j < kVector; ++j) higher = fmaxf(higher, y.x[j]);
    sum *= expf(top - higher);
    top = higher;
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += expf(y.x[j] - top);
  }
  const float highest = team.max(top);
  sum = team.sum(sum * expf(top - highest));
  if (team.thread == 0) loss.store_loss(row, highest, sum);
  if (!loss.dlogits) return;
  const float scale = loss.scale(row), over_sum = 1.0f / sum;
  const int target = loss.target(row);
#pragma unroll 2
  for (int column = team.column(0); column < loss.V; column += kRowThreads * kVector)
    loss.store_gradient(row, column, loss.capped(z, column), highest, over_sum, target, scale);
}

template <class S>
void launch_losses(cudaStream_t stream, const Loss<S>& loss) {
  if (loss.V > kMaxHeldRow) {
    long_row_losses<S><<<static_cast<unsigned>(loss.rows), kRowThreads, 0, stream>>>(loss);
    PGOLF_LAUNCHED("long_row_losses");
    return;
  }
  with_team<kMaxVectors>(loss.V, [&](auto vectors, int warps) {
    row_losses<S, vectors><<<row_blocks(loss.rows, warps), kRowThreads, 0, stream>>>(loss, warps);
    PGOLF_LAUNCHED("row_losses");
  });
}

// The adapters, or their gradients, of the chunk's first sequence.
void* first_adapters(const TensorView& of, const Dims& s, const Positions& positions) {
  const i64 sequence = positions.start / (s.rows / s.B);
  return of.as<char>() + static_cast<std::size_t>(sequence * of.shape[1]) * size_of(of.dtype);
}

// logits [rows, stride] of the computed rows from `start` on, before the softcap
template <class S>
void chunk_logits(const CudaBackend& backend, const Head& op, const Dims& s, const Positions& positions, i64 rows,
                  const ForwardScratch& scratch, float* logits, i64 stride) {
  with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
    norm_rows<S, vectors><<<row_blocks(rows, warps), kRowThreads, 0, backend.stream()>>>(
        op.x.as<S>(), positions, rows, static_cast<int>(s.d), warps, 1.0f, static_cast<S*>(scratch.normed),
        scratch.factors);
    PGOLF_LAUNCHED("norm_rows");
  });
  backend.gemm(s.linear(backend.dtype(), rows, stride).forward(scratch.normed, op.w.data, logits, DType::f32));
  if (!s.rank) return;
  const Adapters<1> adapters = s.adapters(backend.dtype(), rows);
  const void* const numbers = first_adapters(op.adapters, s, positions);
  backend.gemm(adapters.down(scratch.normed, numbers, scratch.u));
  backend.gemm(adapters.up(0, scratch.u, numbers, logits, stride, DType::f32));
}

// body(positions, rows) for every chunk
template <class F>
void for_chunks(const Head& op, const Dims& s, F&& body) {
  for (i64 start = 0; start < s.rows; start += s.chunk)
    body(Positions{start, static_cast<unsigned>(s.T), static_cast<unsigned>(op.first)},
         std::min(s.chunk, s.rows - start));
}

template <class S>
Loss<S> loss_of(const Head& op, const Dims& s, const Positions& positions, i64 rows, const float* logits) {
  return {logits,
          rows,
          s.stride,
          static_cast<int>(s.V),
          op.targets.as<std::int32_t>(),
          positions,
          Softcap(op.softcap),
          op.losses.as<float>() + positions.start,
          1.0,
          nullptr,
          nullptr,
          nullptr};
}

}  // namespace

OpBytes CudaBackend::head_bytes(const Head& op) const {
  const Dims s(op);
  Layout forward, backward;
  ForwardScratch(forward, storage_, s, static_cast<bool>(op.logits));
  BackwardScratch(backward, storage_, s);
  return {0, forward.used(), backward.used()};
}

void CudaBackend::head_logits(const Head& op) {
  const Dims s(op);
  Layout layout(op.scratch.data);
  const ForwardScratch scratch(layout, storage_, s, true);
  with_storage(storage_, [&](auto type) {
    for_chunks(op, s, [&](const Positions& positions, i64 rows) {
      float* logits = op.logits.as<float>() + positions.start * s.V;
      chunk_logits<decltype(type)>(*this, op, s, positions, rows, scratch, logits, s.V);
      cap_logits<<<blocks_for(rows * s.V, kThreads * kVector), kThreads, 0, stream()>>>(logits, rows * s.V,
                                                                                        Softcap(op.softcap));
      PGOLF_LAUNCHED("cap_logits");
    });
  });
}

void CudaBackend::head_loss(const Head& op) {
  const Dims s(op);
  Layout layout(op.scratch.data);
  const ForwardScratch scratch(layout, storage_, s, false);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    for_chunks(op, s, [&](const Positions& positions, i64 rows) {
      chunk_logits<S>(*this, op, s, positions, rows, scratch, scratch.logits, s.stride);
      launch_losses(stream(), loss_of<S>(op, s, positions, rows, scratch.logits));
    });
  });
}

void CudaBackend::head_loss_backward(const Head& op, const HeadGrads& grads) {
  const Dims s(op);
  Layout layout(grads.scratch.data);
  const BackwardScratch scratch(layout, storage_, s);
  const ForwardScratch& forward = scratch.forward;
  if (op.first) zero(grads.dx);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    for_chunks(op, s, [&](const Positions& positions, i64 rows) {
      chunk_logits<S>(*this, op, s, positions, rows, forward, forward.logits, s.stride);
      Loss<S> loss = loss_of<S>(op, s, positions, rows, forward.logits);
      loss.loss_scale = grads.loss_scale;
      loss.multiplier = grads.multiplier;
      if (grads.weights) loss.weights = grads.weights.as<float>() + positions.start;
      loss.dlogits = static_cast<S*>(scratch.dlogits);
      launch_losses(stream(), loss);
      const Linear linear = s.linear(storage_, rows, s.stride);
      const Adapters<1> adapters = s.adapters(storage_, rows);
      if (s.rank) {
        gemm(adapters.up_backward(0, loss.dlogits, s.stride, first_adapters(op.adapters, s, positions), scratch.du));
        if (grads.adapters) {
          void* const gradients = first_adapters(grads.adapters, s, positions);
          gemm(adapters.a_gradient(scratch.du, forward.normed, gradients));
          gemm(adapters.b_gradient(0, loss.dlogits, s.stride, forward.u, gradients));
        }
      }
      gemm(linear.backward(loss.dlogits, op.w.data, forward.normed));
      if (s.rank) gemm(adapters.down_backward(scratch.du, first_adapters(op.adapters, s, positions), forward.normed));
      with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
        norm_rows_backward<S, vectors, false><<<row_blocks(rows, warps), kRowThreads, 0, stream()>>>(
            op.x.as<S>(), positions, forward.factors, rows, static_cast<int>(s.d), warps, 1.0f,
            static_cast<S*>(forward.normed), grads.dx.as<S>(), static_cast<bool>(grads.w));
        PGOLF_LAUNCHED("norm_rows_backward");
      });
      if (grads.w) gemm(linear.weights(loss.dlogits, forward.normed, grads.w.data));
    });
  });
}

}  // namespace pgolf::cuda
