// A transformer block's mixed input (residual mix): its norm, and the gradients of all that it is made of.
#pragma once

#include "cuda/column_reduce.cuh"
#include "cuda/mma.cuh"
#include "cuda/row_ops.cuh"
#include "cuda/tiles.cuh"

namespace pgolf::cuda {

// normed = scale·rms(m). Memory-bound: 2 or 3 reads, 1 write. factors may be null.
template <class S, int kVectors>
__global__ void __launch_bounds__(kRowThreads, 2)
    norm_residual_mix(Mixed<S> in, Positions positions, i64 rows, int d, int warps, float scale, S* __restrict__ normed,
                      float* __restrict__ factors) {
  const Team team(warps);
  const i64 own = team_row(team), row = positions.token(own < rows ? own : rows - 1);
  Packed8<S> raw[kVectors], raw0[kVectors], raw_skip[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = team.column(v);
    if (column >= d) break;
    raw[v] = load_packed(in.x + row * d + column);
    raw0[v] = load_packed(in.x0 + row * d + column);
    if (in.skip) raw_skip[v] = load_packed(in.skip + row * d + column);
  }
  Vector8 m[kVectors];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = team.column(v);
    if (column >= d) break;
    m[v] = unpack(raw[v]);
    if (in.skip) m[v] = in.skipped(m[v], unpack(raw_skip[v]), column);
    m[v] = in.mix(m[v], unpack(raw0[v]), column);
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares = fmaf(m[v].x[j], m[v].x[j], squares);
  }
  const float factor = rms_factor(team.sum(squares), d, scale);
  if (own >= rows) return;
  if (factors && team.thread == 0) factors[row] = factor;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
#pragma unroll
    for (int j = 0; j < kVector; ++j) m[v].x[j] *= factor;
    store8(normed + own * d + team.column(v), m[v]);
  }
}

// What is added to dx at the end.
enum class Pending { none, stored, stored_f32, dskip, dx0 };

struct InputGrads {
  void *dx, *dskip;  // S
  float* dx0;
  const void* pending;
  Pending kind;
};
inline InputGrads input_grads(const QkvGrads& grads) {
  InputGrads g{grads.dx.data, grads.dskip ? grads.dskip.data : nullptr, grads.dx0.as<float>(), grads.pending.data,
               Pending::none};
  if (grads.pending)
    g.kind = g.pending == g.dx0                      ? Pending::dx0
             : g.pending == g.dskip                  ? Pending::dskip
             : grads.pending.dtype == grads.dx.dtype ? Pending::stored
                                                     : Pending::stored_f32;
  return g;
}

inline constexpr int kAddedWidth = 16;

// What adapters add to dnormed, du·a, for 2·rank = kAddedWidth, for the rows of a block's iteration, one a warp. Each
// warp computes a slice of the columns of all of them by mma, and the rows' own warps read the sums from shared memory.
// The rows of an iteration are of one sequence, and those of a block are contiguous: its a's, there as well, seldom
// change.
template <class S>
struct Added {
  const S *du, *a;  // [N, 16]; the first sequence's a's
  i64 step;         // from one sequence's to the next
  i64 run;          // rows of a block
  int T;

  static __host__ __device__ constexpr int stride(int d) { return d + 4; }  // rows begin in different banks
  static __host__ __device__ constexpr int floats(int d) { return 2 * kRowWarps * stride(d); }
  static constexpr int bytes(int d) { return floats(d) * int(sizeof(float)) + kAddedWidth * d * int(sizeof(S)); }
};
template <class S, int kTiles>  // kTiles: of 16 columns, that a slice of d/8 has at most
class AddedRows {
  using Of = Added<S>;

 public:
  __device__ AddedRows(const Of& of, float* room, int d)
      : of_(of),
        room_(room),
        own_a_(reinterpret_cast<uint4*>(room + Of::floats(d)) + threadIdx.x),
        d_(d),
        slice_(threadIdx.x / kWarp * (d / kRowWarps)) {}

  // Begins the iteration of the rows from `base` on.
  __device__ void read(i64 base) {
    const S* row = of_.du + (base + lane_row(0)) * kAddedWidth + lane_column(0);
    du_[0] = *reinterpret_cast<const unsigned*>(row);
    du_[1] = *reinterpret_cast<const unsigned*>(row + kAddedWidth / 2);
    const int sequence = static_cast<int>(static_cast<unsigned>(base) / static_cast<unsigned>(of_.T));
    if (sequence == sequence_) return;
    sequence_ = sequence;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 16 >= d_ / kRowWarps) break;
      const S* const at = of_.a + sequence * of_.step + lane_column(0) * d_ + column(tile);
      unsigned row[4];  // two neighbours of each row
#pragma unroll
      for (int k = 0; k < 4; ++k)
        row[k] = *reinterpret_cast<const unsigned*>(at + (k / 2 * (kAddedWidth / 2) + k % 2) * d_);
      own_a_[tile * kRowThreads] = {__byte_perm(row[0], row[1], 0x5410), __byte_perm(row[0], row[1], 0x7632),
                                    __byte_perm(row[2], row[3], 0x5410), __byte_perm(row[2], row[3], 0x7632)};
    }
  }
  // The sums for this warp's row, valid until the iteration after the next. For all threads of the block.
  __device__ const float* sums() {
    float* const here = room_ + turn_ * kRowWarps * Of::stride(d_);
    turn_ ^= 1;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 16 >= d_ / kRowWarps) break;
      const uint4 a = own_a_[tile * kRowThreads];
      float c[4] = {};
      mma_m16n8k16<S>(c, {a.x, a.y, a.z, a.w}, du_[0], du_[1]);
      // The columns of c are rows of the iteration; its rows g and g + 8 are neighbouring columns.
      float* const at = here + lane_column(0) * Of::stride(d_) + column(tile);
      *reinterpret_cast<float2*>(at) = {c[0], c[2]};
      *reinterpret_cast<float2*>(at + Of::stride(d_)) = {c[1], c[3]};
    }
    __syncthreads();  // double-buffered: who overwrites this buffer has passed the next barrier
    return here + threadIdx.x / kWarp * Of::stride(d_);
  }

 private:
  __device__ int column(int tile) const { return slice_ + tile * 16 + lane_row(0) * 2; }

  const Of& of_;
  float* room_;
  uint4* own_a_;  // fragments, for this thread alone
  int d_, slice_, turn_ = 0, sequence_ = -1;
  unsigned du_[2];
};

// The gradient at m, from dx (the residual path's) and dnormed, and from it all that m is made of. dnormed gives way to
// normed. Memory-bound: x, x0, skip, dnormed, dx, pending read, normed, dx, dskip written in S, dx0 read and written.
// Occupancy is low, so that all loads of a row are in flight before any of it is used.
// dx0 may be null; kSums: the gradients of the vectors are summed; kAdds: adapters add to dnormed.
template <class S, int kVectors, bool kSkip, bool kSums, bool kAdds>
__global__ void __launch_bounds__(kRowThreads, kVectors * sizeof(S) <= 4 && !(kSums && kSkip) ? 2 : 1)
    residual_mix_backward(Mixed<S> in, i64 rows, int d, int warps, float scale, const float* __restrict__ factors,
                          S* dnormed_to_normed, InputGrads grads, float* __restrict__ partials,
                          const __grid_constant__ Added<S> added) {
  constexpr bool kRoom = kVectors * sizeof(S) <= 4;  // in a thread's registers, for dx0 as well
  extern __shared__ __align__(16) float shared[];    // [d], then Added::bytes
  const Team team(warps);
  Vector8 dmix0[kVectors] = {}, dmix1[kVectors] = {}, dweight[kSkip ? kVectors : 1] = {};
  AddedRows<S, 2 * kVectors> added_rows(added, shared + d, d);
  const i64 step = kAdds ? team.teams() : i64{gridDim.x} * team.teams();
  const i64 first = i64{blockIdx.x} * (kAdds ? added.run : team.teams());
  const i64 end = kAdds && first + added.run < rows ? first + added.run : rows;
  for (i64 base = first; base < end; base += step) {
    const i64 own = base + team.index, row = own < rows ? own : rows - 1;
    const float factor = factors[row];
    if constexpr (kAdds) added_rows.read(base);
    Packed8<S> raw[kVectors], raw0[kVectors], raw_dn[kVectors], raw_skip[kSkip ? kVectors : 1], raw_dx[kVectors];
    Packed8<S> raw_pending[kVectors];
    Packed8<float> raw_dx0[kRoom ? kVectors : 1];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = team.column(v);
      if (column >= d) break;
      const i64 at = row * d + column;
      raw[v] = load_packed(in.x + at);
      raw0[v] = load_packed(in.x0 + at);
      raw_dn[v] = load_packed<S>(dnormed_to_normed + at);
      if constexpr (kSkip) raw_skip[v] = load_packed(in.skip + at);
      raw_dx[v] = load_packed(static_cast<const S*>(grads.dx) + at);
      if (grads.kind == Pending::stored) raw_pending[v] = load_packed(static_cast<const S*>(grads.pending) + at);
      if constexpr (kRoom)
        if (grads.dx0) raw_dx0[v] = load_packed<float>(grads.dx0 + at);
    }
    const float* sums = nullptr;
    if constexpr (kAdds) sums = added_rows.sums();
    const auto gradient = [&](int v) {  // at normed
      Vector8 dn = unpack(raw_dn[v]);
      if constexpr (kAdds) {
        const Vector8 more = load8(sums + team.column(v));
#pragma unroll
        for (int j = 0; j < kVector; ++j) dn.x[j] += more.x[j];
      }
      return dn;
    };
    const auto mixed = [&](int v, Vector8& at_sum) {
      at_sum = unpack(raw[v]);
      if constexpr (kSkip) at_sum = in.skipped(at_sum, unpack(raw_skip[v]), team.column(v));
      return in.mix(at_sum, unpack(raw0[v]), team.column(v));
    };
    float dot = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (team.column(v) >= d) break;
      Vector8 at_sum;
      const Vector8 m = mixed(v, at_sum), dn = gradient(v);
#pragma unroll
      for (int j = 0; j < kVector; ++j) dot = fmaf(m.x[j] * factor, dn.x[j], dot);
    }
    const float mean = team.sum(dot) / (static_cast<float>(d) * scale * scale);
    if (own >= rows) continue;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = team.column(v);
      if (column >= d) break;
      const i64 at = row * d + column;
      Vector8 at_sum, normed = mixed(v, at_sum), g = unpack(raw_dx[v]), g0{};
      if (grads.dx0) {
        if constexpr (kRoom)
          g0 = unpack(raw_dx0[v]);
        else
          g0 = load8<float>(grads.dx0 + at);
      }
      const Vector8 x0 = unpack(raw0[v]), dn = gradient(v);
      const Vector8 mix0 = load8(in.mix0 + column), mix1 = load8(in.mix1 + column);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        normed.x[j] *= factor;
        g.x[j] += factor * (dn.x[j] - normed.x[j] * mean);
        if constexpr (kSums) {
          dmix0[v].x[j] = fmaf(g.x[j], at_sum.x[j], dmix0[v].x[j]);
          dmix1[v].x[j] = fmaf(g.x[j], x0.x[j], dmix1[v].x[j]);
        }
        g0.x[j] = fmaf(mix1.x[j], g.x[j], g0.x[j]);
        g.x[j] *= mix0.x[j];  // from here on the gradient at the sum with the skip
      }
      store8(dnormed_to_normed + at, normed);
      if (grads.dx0) store8(grads.dx0 + at, g0);
      Vector8 back{};  // what joins dx
      if constexpr (kSkip) {
        const Vector8 skip = unpack(raw_skip[v]), weight = load8(in.weight + column);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          if constexpr (kSums) dweight[v].x[j] = fmaf(g.x[j], skip.x[j], dweight[v].x[j]);
          back.x[j] = to_float(from_float<S>(weight.x[j] * g.x[j]));
        }
        store8(static_cast<S*>(grads.dskip) + at, back);
      }
      if (grads.kind == Pending::stored) back = unpack(raw_pending[v]);
      if (grads.kind == Pending::stored_f32) back = load8(static_cast<const float*>(grads.pending) + at);
      if (grads.kind == Pending::dx0) back = g0;
      if (grads.kind != Pending::none) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) g.x[j] += back.x[j];
      }
      store8(static_cast<S*>(grads.dx) + at, g);
    }
  }
  if constexpr (kSums) {
    float* partial = partials + i64{blockIdx.x} * 3 * d;
    store_columns(team, dmix0, d, shared, partial);
    store_columns(team, dmix1, d, shared, partial + d);
    if constexpr (kSkip) store_columns(team, dweight, d, shared, partial + 2 * d);
  }
}

}  // namespace pgolf::cuda
