// Row-wise kernels: rows on teams of warps, RMS norm forward and backward, and a transformer block's mixed input.
//
// A team of 1, 2, 4 or 8 warps of a block holds one row in registers: thread i of it has vector i, i + the team's
// threads, and so on, at most four. One warp, which needs no barrier, suffices up to 1,024 numbers. Control flow is
// uniform in a block: teams without a row of their own repeat the last one and store nothing.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/common.cuh"

namespace pgolf::cuda {

inline constexpr int kRowWarps = 8;  // of a block
inline constexpr int kRowThreads = kRowWarps * kWarp;
inline constexpr int kMaxVectors = 4;  // of one thread; more would not fit its registers
inline constexpr i64 kMaxTeamRow = i64{kRowThreads} * kMaxVectors * kVector;

// Eight numbers as they lie in memory: half the registers of a Vector8 where S has 16 bits.
template <class S>
struct Packed8 {
  uint4 piece[kVector * sizeof(S) / 16];
};
template <class S>
__device__ __forceinline__ Packed8<S> load_packed(const S* from) {
  Packed8<S> p;
#pragma unroll
  for (int i = 0; i < int(kVector * sizeof(S) / sizeof(uint4)); ++i)
    p.piece[i] = reinterpret_cast<const uint4*>(from)[i];
  return p;
}
template <class S>
__device__ __forceinline__ Vector8 unpack(const Packed8<S>& p) {
  const S* raw = reinterpret_cast<const S*>(p.piece);
  Vector8 v;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v.x[i] = to_float(raw[i]);
  return v;
}

// A thread's place in its team.
struct Team {
  int warps, index, thread;  // warps of a team, this team's number in the block, this thread's in the team

  __device__ explicit Team(int warps_of_team)
      : warps(warps_of_team),
        index(threadIdx.x / (warps_of_team * kWarp)),
        thread(threadIdx.x % (warps_of_team * kWarp)) {}
  __device__ int teams() const { return kRowWarps / warps; }
  __device__ int column(int vector) const { return (thread + vector * warps * kWarp) * kVector; }

  // Sums and maxima over the team, in an order that depends on its size alone; every thread gets them.
  __device__ float sum(float x) const {
    return combine(warp_sum(x), [](float a, float b) { return a + b; });
  }
  __device__ float max(float x) const { return combine(warp_max(x), fmaxf); }

 private:
  template <class F>
  __device__ float combine(float x, F op) const {
    __shared__ float of_warp[kRowWarps];
    if (warps == 1) return x;
    __syncthreads();  // all have read what the reduction before this one left
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    const float* mine = of_warp + index * warps;
    x = mine[0];
    for (int i = 1; i < warps; ++i) x = op(x, mine[i]);
    return x;
  }
};

// body(vectors, warps): the vectors of a thread, an integral_constant of at most `Max`, and the warps of a team, for
// rows of `width` ≤ 2,048·Max numbers.
template <int Max, class F>
void with_team(i64 width, F&& body) {
  int warps = 1;
  while (width > i64{warps} * kWarp * kVector * Max) warps *= 2;
  require(warps <= kRowWarps, "A row has ", width, " numbers; the CUDA backend takes rows of at most ",
          kMaxTeamRow * Max / kMaxVectors, ".");
  const i64 vectors = (width + warps * kWarp * kVector - 1) / (warps * kWarp * kVector);
  if (vectors <= 1) return body(std::integral_constant<int, 1>{}, warps);
  if (vectors == 2) return body(std::integral_constant<int, 2>{}, warps);
  if constexpr (Max > 2)
    if (vectors == 3) return body(std::integral_constant<int, 3>{}, warps);
  if constexpr (Max > 3) body(std::integral_constant<int, 4>{}, warps);
}
// The same for rows of a model's width, of which all vectors are whole.
template <int Max, class F>
void with_row_team(i64 d, F&& body) {
  require(d % kVector == 0, "A row has ", d, " numbers; the CUDA backend needs a multiple of ", kVector, ".");
  with_team<Max>(d, std::forward<F>(body));
}

inline unsigned row_blocks(i64 rows, int warps) { return blocks_for(rows, kRowWarps / warps); }
__device__ __forceinline__ i64 team_row(const Team& team) { return i64{blockIdx.x} * team.teams() + team.index; }

// scale·rms(x) is x times this
__device__ __forceinline__ float rms_factor(float sum_of_squares, int d, float scale = 1.0f) {
  return scale / sqrtf(sum_of_squares / static_cast<float>(d) + static_cast<float>(kRmsEpsilon));
}

// Which tokens an operation computes: positions first … T−1 of every sequence, from the start-th on.
struct Positions {
  i64 start;
  unsigned T, first;
  __device__ i64 token(i64 row) const {
    row += start;
    if (first == 0) return row;
    const unsigned r = static_cast<unsigned>(row), length = T - first;
    return i64{r / length} * T + first + r % length;
  }
};

// normed = scale·rms(x), or where that is null the rows' factors alone. Memory-bound: 1 read, 1 write.
template <class S, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
    norm_rows(const S* __restrict__ x, Positions positions, i64 rows, int d, int warps, float scale,
              S* __restrict__ normed, float* __restrict__ factors) {
  const Team team(warps);
  const i64 row = team_row(team);
  const S* from = x + positions.token(row < rows ? row : rows - 1) * d;
  Packed8<S> raw[kVectors];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (team.column(v) < d) raw[v] = load_packed(from + team.column(v));
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
    const Vector8 a = unpack(raw[v]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares = fmaf(a.x[j], a.x[j], squares);
  }
  const float factor = rms_factor(team.sum(squares), d, scale);
  if (row >= rows) return;
  if (team.thread == 0) factors[row] = factor;
  if (normed == nullptr) return;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
    Vector8 a = unpack(raw[v]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) a.x[j] *= factor;
    store8(normed + row * d + team.column(v), a);
  }
}

// dx = (or +=) the gradient at x, given that at normed = scale·rms(x), in whose place normed itself is left for the
// weight gradient, if there is one. Memory-bound: 2 (3) reads, 2 writes.
template <class S, int kVectors, bool kAdd>
__global__ void __launch_bounds__(kRowThreads)
    norm_rows_backward(const S* __restrict__ x, Positions positions, const float* __restrict__ factors, i64 rows, int d,
                       int warps, float scale, S* dnormed_to_normed, S* __restrict__ dx, bool keep_normed) {
  const Team team(warps);
  const i64 own = team_row(team), row = own < rows ? own : rows - 1;
  const float factor = factors[row];
  const i64 token = positions.token(row);
  const S* from = x + token * d;
  S* between = dnormed_to_normed + row * d;
  Packed8<S> raw[kVectors], raw_dn[kVectors], raw_dx[kAdd ? kVectors : 1];
  float dot = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
    raw[v] = load_packed(from + team.column(v));
    raw_dn[v] = load_packed<S>(between + team.column(v));
    if constexpr (kAdd) raw_dx[v] = load_packed<S>(dx + token * d + team.column(v));
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
    const Vector8 a = unpack(raw[v]), dn = unpack(raw_dn[v]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) dot = fmaf(a.x[j] * factor, dn.x[j], dot);
  }
  const float mean = team.sum(dot) / (static_cast<float>(d) * scale * scale);
  if (own >= rows) return;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
    Vector8 normed = unpack(raw[v]), g = unpack(raw_dn[v]), sum;
    if constexpr (kAdd) sum = unpack(raw_dx[v]);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      normed.x[j] *= factor;
      g.x[j] = factor * (g.x[j] - normed.x[j] * mean);
      if constexpr (kAdd) g.x[j] += sum.x[j];
    }
    store8(dx + token * d + team.column(v), g);
    if (keep_normed) store8(between + team.column(v), normed);
  }
}

// MixedInput on the device, where every kernel that reads it gets the same bits:
// m = mix0⊙(x + weight⊙skip) + mix1⊙x0.
template <class S>
struct Mixed {
  const S *x, *x0, *skip;  // skip may be null
  const float *mix0, *mix1, *weight;

  explicit Mixed(const MixedInput& in)
      : x(in.x.as<S>()),
        x0(in.x0.as<S>()),
        skip(in.skip ? in.skip.as<S>() : nullptr),
        mix0(in.resid_mix.as<float>()),
        mix1(mix0 + in.x.shape[2]),
        weight(in.skip ? in.skip_weight.as<float>() : nullptr) {}

  // The sum with the skip of eight columns.
  __device__ __forceinline__ Vector8 skipped(Vector8 at_x, const Vector8& at_skip, int column) const {
    return skipped(at_x, at_skip, load8(weight + column));
  }
  static __device__ __forceinline__ Vector8 skipped(Vector8 at_x, const Vector8& at_skip, const Vector8& w) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) at_x.x[j] = fmaf(w.x[j], at_skip.x[j], at_x.x[j]);
    return at_x;
  }
  __device__ __forceinline__ Vector8 mix(Vector8 at_sum, const Vector8& at_x0, int column) const {
    return mix(at_sum, at_x0, load8(mix0 + column), load8(mix1 + column));
  }
  static __device__ __forceinline__ Vector8 mix(Vector8 at_sum, const Vector8& at_x0, const Vector8& a,
                                                const Vector8& b) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) at_sum.x[j] = fmaf(b.x[j], at_x0.x[j], __fmul_rn(a.x[j], at_sum.x[j]));
    return at_sum;
  }
};

}  // namespace pgolf::cuda
