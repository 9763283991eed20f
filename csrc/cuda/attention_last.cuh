// Attention of the last position alone, over the keys of all: what the next token of a text needs.
//
// A block owns a query head. Its lanes form teams, each of which holds one row of the head's width, eight numbers a
// lane. Team i walks over keys i, i + kTeams, … with a running maximum; at the end the teams' sums are put together in
// order. Nothing is rounded but the output.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/row_ops.cuh"

namespace pgolf::cuda {

inline constexpr int kLastThreads = 256;

template <class S, int kLanes>  // of a team: a power of two, with kLanes·8 ≥ D
__global__ void __launch_bounds__(kLastThreads) attention_last(const AttentionArgs<S> a) {
  constexpr int kTeams = kLastThreads / kLanes, kAhead = 4;  // kAhead: keys of a team that are on their way at once
  __shared__ float tops[kTeams], sums[kTeams], rows[kTeams][kLanes * kVector];
  const int team = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kVector;
  const int b = blockIdx.x / a.H, h = blockIdx.x % a.H, stride = a.K * a.D;
  const bool held = column < a.D;
  const i64 kv_head = a.kv_head_at(b, h / a.group()) + column;
  const S *keys = a.k + kv_head, *values = a.v + kv_head;
  const float scale = a.gain[h] * a.root;
  Vector8 q = {}, o = {};
  if (held) q = load8(a.q + a.head_at(b, h) + column);

  float top = -INFINITY, sum = 0.0f;
  for (int first = 0; first < a.T; first += kTeams * kAhead) {
    Packed8<S> key_rows[kAhead] = {}, value_rows[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int key = first + i * kTeams + team;
      if (!held || key >= a.T) continue;
      key_rows[i] = load_packed(keys + key * stride);
      value_rows[i] = load_packed(values + key * stride);
    }
    float scores[kAhead], best = top;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const Vector8 k = unpack(key_rows[i]);
      float product = 0.0f;
#pragma unroll
      for (int j = 0; j < kVector; ++j) product = fmaf(q.x[j], k.x[j], product);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) product += __shfl_xor_sync(0xffffffffu, product, offset);
      scores[i] = scale * product;
      if (first + i * kTeams + team < a.T) best = fmaxf(best, scores[i]);
    }
    const float shrink = top == best ? 1.0f : expf(top - best);
    top = best;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < kVector; ++j) o.x[j] *= shrink;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * kTeams + team >= a.T) continue;
      const float p = expf(scores[i] - best);
      const Vector8 v = unpack(value_rows[i]);
      sum += p;
#pragma unroll
      for (int j = 0; j < kVector; ++j) o.x[j] = fmaf(p, v.x[j], o.x[j]);
    }
  }

#pragma unroll
  for (int j = 0; j < kVector; ++j) rows[team][column + j] = o.x[j];
  if (column == 0) {
    tops[team] = top;
    sums[team] = sum;
  }
  __syncthreads();
  const int own = threadIdx.x;
  if (own >= a.D) return;
  float best = -INFINITY, total = 0.0f, weight = 0.0f;
  for (int t = 0; t < kTeams; ++t) best = fmaxf(best, tops[t]);
  for (int t = 0; t < kTeams; ++t) {
    const float share = expf(tops[t] - best);  // 0 of a team without keys
    total = fmaf(share, rows[t][own], total);
    weight = fmaf(share, sums[t], weight);
  }
  a.o[a.head_at(b, h) + own] = from_float<S>(total / weight);
}

template <class S>
void launch_attention_last(const AttentionArgs<S>& a, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch("attention_last", kernel, static_cast<unsigned>(a.batch * a.H), kLastThreads, 0, stream, a);
  };
  static_assert(kMostHeadWidth <= 16 * kVector);
  if (a.D <= 4 * kVector) return run(attention_last<S, 4>);
  if (a.D <= 8 * kVector) return run(attention_last<S, 8>);
  run(attention_last<S, 16>);
}

}  // namespace pgolf::cuda
