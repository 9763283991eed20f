// Norm and RoPE of q and k between the qkv GEMM and attention, forward and backward: as kernels of their own and in the
// GEMM's epilogue. What adapters add to q and v comes before.
#pragma once

#include "cuda/qk_norm_rope_tiles.cuh"
#include "cuda/row_ops.cuh"
#include "cuda/sm90/weight_stationary_gemm.cuh"

namespace pgolf::cuda {

// Which of q, k and v a GEMM computes, and for which positions.
struct ProductPart {
  i64 rows, T, first;  // tokens; of a sequence; the first one's position
  i64 H, K;            // heads of q, and of k and v
};

// How lanes share the heads of tokens: a group of lanes has one head, each lane `kUnit` of RoPE's pairs. Few and
// small fields: the kernels are memory-bound, and address arithmetic before the first load delays them.
struct Heads {
  i64 N;
  int T, first, H, K, D;
  int group_bits;  // lanes of a group: the power of two from D/2/kUnit on
  int center;      // D/2
  RopeOrder order;

  Heads(const ProductPart& part, i64 width, int unit, RopeOrder rope_order)
      : N(part.rows),
        T(int(part.T)),
        first(int(part.first)),
        H(int(part.H)),
        K(int(part.K)),
        D(int(width)),
        group_bits(0),
        center(D / 2),
        order(rope_order) {
    while (unit << group_bits < center) ++group_bits;
  }
  unsigned blocks(int heads) const { return blocks_for(N * heads, kRowThreads >> group_bits); }
};

// What one lane works at.
template <int kUnit>
struct HeadLane {
  i64 token;
  int head, pair;  // pair: its first one of a head's
  int column;      // of a head, of the first pair's first number; and from there to its second one
  int to_second;
  bool works;     // whether it has numbers; all lanes take part in sums
  bool rotates;   // q or k, not v
  i64 at_packed;  // of its first number in [N, (H + 2K)·D]
  i64 at_own;     // … in q, k or v
  i64 at_factor;  // of the head in [N, H] or [N, K]
  int at_angle;

  __device__ HeadLane(const Heads& s, unsigned heads) {  // that have lanes: the first of H + 2K
    const unsigned item = blockIdx.x * (kRowThreads >> s.group_bits) + (threadIdx.x >> s.group_bits);
    pair = static_cast<int>(threadIdx.x & ((1u << s.group_bits) - 1)) * kUnit;
    token = item / heads;
    head = static_cast<int>(item % heads);
    works = token < s.N && pair < s.center;
    if (token >= s.N) token = s.N - 1;
    rotates = head < s.H + s.K;
    const auto place = [&](int at) { return s.order(at / 8, s.center / 8) * 8 + at % 8; };
    column = s.order.tiles ? place(pair) : pair;
    to_second = s.order.tiles ? place(pair + s.center) - column : s.center;
    at_packed = (token * (s.H + 2 * s.K) + head) * s.D + column;
    const int own_heads = head < s.H ? s.H : s.K;
    const int own_head = head < s.H ? head : rotates ? head - s.H : head - s.H - s.K;
    at_factor = token * own_heads + own_head;
    at_own = at_factor * s.D + column;
    at_angle = (s.first + static_cast<int>(static_cast<unsigned>(token) % s.T)) * s.center + pair;
  }
};

__device__ __forceinline__ float group_sum(float x, int group_bits) {
  for (int offset = 1 << group_bits >> 1; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// kUnit numbers, 4 or 8, in pieces of 8 or 16 bytes; also as they lie in memory.
template <int kUnit>
struct Unit {
  float x[kUnit];
};
template <int kUnit, class S>
struct PackedUnit {
  using Piece = std::conditional_t<kUnit * sizeof(S) == 8, uint2, uint4>;
  Piece piece[kUnit * sizeof(S) / sizeof(Piece)];
};
template <int kUnit, class S>
__device__ __forceinline__ PackedUnit<kUnit, S> load_packed_unit(const S* from) {
  using Packed = PackedUnit<kUnit, S>;
  Packed p;
#pragma unroll
  for (int i = 0; i < int(sizeof(Packed) / sizeof(p.piece[0])); ++i)
    p.piece[i] = reinterpret_cast<const typename Packed::Piece*>(from)[i];
  return p;
}
template <int kUnit, class S>
__device__ __forceinline__ Unit<kUnit> unpack_unit(const PackedUnit<kUnit, S>& p) {
  const S* raw = reinterpret_cast<const S*>(p.piece);
  Unit<kUnit> u;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) u.x[i] = to_float(raw[i]);
  return u;
}
template <int kUnit, class S>
__device__ __forceinline__ Unit<kUnit> load_unit(const S* from) {
  return unpack_unit(load_packed_unit<kUnit>(from));
}
template <int kUnit, class S>
__device__ __forceinline__ void store_unit(S* to, const Unit<kUnit>& u) {
  using Piece = std::conditional_t<kUnit * sizeof(S) == 8, uint2, uint4>;
  alignas(16) S raw[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) raw[i] = from_float<S>(u.x[i]);
#pragma unroll
  for (int i = 0; i < int(sizeof(S) * kUnit / sizeof(Piece)); ++i)
    reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(raw)[i];
}

// What adapters add to q and v: u·bᵀ. The b's of a sequence, [out, rank] in S, are read by all its
// tokens, from L2.
template <class S>
struct Delta {
  const S *u, *b;    // u: [N, 2·rank]; b: the first sequence's b of q
  i64 step, b_of_v;  // from one sequence's to the next; from q's to v's
  int rank;

  // `column` of the head, kUnit numbers
  template <int kUnit>
  __device__ __forceinline__ void add_to(Unit<kUnit>& x, const HeadLane<kUnit>& lane, const Heads& s,
                                         int column) const {
    const bool query = lane.head < s.H;
    const int own_head = query ? lane.head : lane.head - s.H - s.K;
    const S* from = u + (lane.token * 2 + (query ? 0 : 1)) * rank;
    const S* rows = b + static_cast<unsigned>(lane.token) / static_cast<unsigned>(s.T) * step + (query ? 0 : b_of_v) +
                    (i64{own_head} * s.D + column) * rank;
    if (rank % kVector == 0) {
      for (int r = 0; r < rank; r += kVector) {
        const Vector8 at_u = load8(from + r);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const Vector8 at_b = load8(rows + j * rank + r);
#pragma unroll
          for (int i = 0; i < kVector; ++i) x.x[j] = fmaf(at_u.x[i], at_b.x[i], x.x[j]);
        }
      }
    } else {
      for (int r = 0; r < rank; ++r) {
        const float at_u = to_float(from[r]);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) x.x[j] = fmaf(at_u, to_float(rows[j * rank + r]), x.x[j]);
      }
    }
  }

  // The same for a warp's 16 rows of one sequence, by mma: 128 columns of q, or of v. The
  // rank is a multiple of 8.
  __device__ __forceinline__ void add_to_rows(float (&x)[16][4], i64 row, i64 rows, int T, bool query,
                                              int column) const {
    if (row >= rows) return;
    const S* const of_rows = u + (query ? 0 : rank) + lane_column(0);
    const S* const of_columns = b + static_cast<unsigned>(row) / static_cast<unsigned>(T) * step +
                                (query ? 0 : b_of_v) + i64{column} * rank + lane_column(0);
    for (int r = 0; r < rank; r += 16) {
      const bool second = r + kVector < rank;
      unsigned a[4] = {};
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const i64 own = row + lane_row(2 * half_row);
        if (own >= rows) continue;
        const S* at = of_rows + own * (2 * rank) + r;
        a[half_row] = *reinterpret_cast<const unsigned*>(at);
        if (second) a[half_row + 2] = *reinterpret_cast<const unsigned*>(at + kVector);
      }
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const S* at = of_columns + (n * 8 + threadIdx.x % kWarp / 4) * rank + r;
        mma_m16n8k16<S>(x[n], a, *reinterpret_cast<const unsigned*>(at),
                        second ? *reinterpret_cast<const unsigned*>(at + kVector) : 0);
      }
    }
  }
};

// q, k = rope(rms(product)) per head; v is copied. Memory-bound: 1 read, 1 write.
template <class S, int kUnit, bool kAdapted>
__global__ void __launch_bounds__(kRowThreads)
    qk_norm_rope(Heads s, const S* __restrict__ packed, Delta<S> delta, const float* __restrict__ cos,
                 const float* __restrict__ sin, S* __restrict__ q, S* __restrict__ k, S* __restrict__ v,
                 float* __restrict__ q_factors, float* __restrict__ k_factors) {
  const HeadLane<kUnit> lane(s, s.H + 2 * s.K);
  Unit<kUnit> a{}, b{}, c, n;
  float squares = 0;
  if (lane.works) {
    a = load_unit<kUnit>(packed + lane.at_packed);
    b = load_unit<kUnit>(packed + lane.at_packed + lane.to_second);
    if (lane.rotates) {
      c = load_unit<kUnit>(cos + lane.at_angle);
      n = load_unit<kUnit>(sin + lane.at_angle);
    }
    if constexpr (kAdapted) {
      if (lane.head < s.H || !lane.rotates) {
        delta.add_to(a, lane, s, lane.column);
        delta.add_to(b, lane, s, lane.column + lane.to_second);
      }
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) squares = fmaf(b.x[j], b.x[j], fmaf(a.x[j], a.x[j], squares));
  }
  squares = group_sum(squares, s.group_bits);
  if (!lane.works) return;
  if (lane.rotates) {
    const float factor = rms_factor(squares, s.D);
    if (lane.pair == 0) (lane.head < s.H ? q_factors : k_factors)[lane.at_factor] = factor;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const float u = a.x[j] * factor, w = b.x[j] * factor;
      a.x[j] = u * c.x[j] + w * n.x[j];
      b.x[j] = w * c.x[j] - u * n.x[j];
    }
  }
  S* out = lane.head < s.H ? q : lane.rotates ? k : v;
  store_unit<kUnit>(out + lane.at_own, a);
  store_unit<kUnit>(out + lane.at_own + lane.to_second, b);
}

// The same as an epilogue, for heads of kWidth numbers; a tile of 128 columns has heads of one tensor. The accumulator
// is rounded to S first, as if it had been in memory.
template <class S, int kWidth, bool kAdapted>
struct QkNormRope {
  static constexpr int kHeads = 128 / kWidth, kColumnTiles = kWidth / 8;
  struct Angles {
    float2 cosines[2][kColumnTiles / 2], sines[2][kColumnTiles / 2];  // of a lane's two rows
  };
  i64 rows;
  int T, first, H, K;
  const float *cos, *sin;
  S *q, *k, *v;
  float *q_factors, *k_factors;
  Delta<S> delta;
  RopeOrder order;

  // Of v, which is not rotated, nothing.
  __device__ Angles read(i64 row, int column) const {
    Angles angles;
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      if (column >= (H + K) * kWidth) break;
      const i64 own = row + lane_row(2 * half_row), token = own < rows ? own : rows - 1;
      const int position = first + static_cast<int>(static_cast<unsigned>(token) % static_cast<unsigned>(T));
      const i64 at = i64{position} * (kWidth / 2) + lane_column(0);
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n) {
        angles.cosines[half_row][n] = *reinterpret_cast<const float2*>(cos + at + n * 8);
        angles.sines[half_row][n] = *reinterpret_cast<const float2*>(sin + at + n * 8);
      }
    }
    return angles;
  }
  __device__ Angles ahead(i64 row, int column) const
    requires(kWidth == 64)  // others' angles would not fit beside the accumulator
  {
    return read(row, column);
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpAccumulator& accumulator, i64 row, int column) const {
    (*this)(tile, accumulator, read(row, column), row, column);
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpAccumulator& accumulator, const Angles& angles, i64 row,
                             int column) const {
    auto& x = accumulator[0];
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 rounded = unpack<S>(pack<S>(x[n][i], x[n][i + 1]));
        x[n][i] = rounded.x;
        x[n][i + 1] = rounded.y;
      }
    const int head = column / kWidth, heads = head < H ? H : K, own_head = head < H ? head : (head - H) % K;
    const bool query = head < H, rotates = head < H + K;
    if constexpr (kAdapted)
      if (query || !rotates) delta.add_to_rows(x, row, rows, T, query, own_head * kWidth);
    if (rotates) {
      // Four lanes share two rows' heads: all sums first, then each lane the factor of one.
      constexpr int kSums = 2 * kHeads;
      const int lane = threadIdx.x % 4;
      float own_squares = 0;
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        const int half_row = sum / kHeads, h = sum % kHeads;
        float squares = 0;
#pragma unroll
        for (int n = h * kColumnTiles; n < (h + 1) * kColumnTiles; ++n)
#pragma unroll
          for (int i = 2 * half_row; i < 2 * half_row + 2; ++i) squares = fmaf(x[n][i], x[n][i], squares);
        squares += __shfl_xor_sync(0xffffffffu, squares, 1);
        squares += __shfl_xor_sync(0xffffffffu, squares, 2);
        if (lane % kSums == sum) own_squares = squares;
      }
      const float own_factor = rms_factor(own_squares, kWidth);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) order.template exchange_rows<kColumnTiles>(x, h * kColumnTiles);
      const i64 own = row + lane_row(lane / kHeads * 2);
      if (lane < kSums && own < rows)
        (query ? q_factors : k_factors)[own * heads + own_head + lane % kHeads] = own_factor;
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        const int half_row = sum / kHeads, h = sum % kHeads;
        const float factor = __shfl_sync(0xffffffffu, own_factor, sum, 4);
#pragma unroll
        for (int n = 0; n < kColumnTiles / 2; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& a = x[h * kColumnTiles + n][2 * half_row + i];
            float& b = x[h * kColumnTiles + n + kColumnTiles / 2][2 * half_row + i];
            const float2 c = angles.cosines[half_row][n], s = angles.sines[half_row][n];
            const float u = a * factor, w = b * factor, cosine = i ? c.y : c.x, sine = i ? s.y : s.x;
            a = u * cosine + w * sine;
            b = w * cosine - u * sine;
          }
      }
    }
    S* out = (query ? q : rotates ? k : v) + (row * heads + own_head) * kWidth;
    const auto place = [&](int n) {
      return rotates ? n / kColumnTiles * kColumnTiles + order(n % kColumnTiles, kColumnTiles / 2) : n;
    };
    store_rows<S, 128, 1>(tile, accumulator, out, heads * kWidth, 0, static_cast<int>(rows - row), 128, place);
  }
};

// The gradients at q and k → those at the GEMM's output, in [N, H + 2K, D]; v's stay. Memory-bound: 2 reads, 1 write of
// H + K heads; all loads are in flight before the first is used.
template <class S, int kUnit>
__global__ void __launch_bounds__(kRowThreads, 4)
    qk_norm_rope_backward(Heads s, const S* __restrict__ q, const S* __restrict__ k, QkNormRopeArgs norms, S* dqkv) {
  const HeadLane<kUnit> lane(s, s.H + s.K);
  const bool query = lane.head < s.H;
  PackedUnit<kUnit, S> raw_a{}, raw_b{}, raw_da{}, raw_db{};
  Unit<kUnit> c, n;
  float dot = 0, factor = 0;
  S* const gradient = dqkv + lane.at_packed;
  if (lane.works) {
    raw_da = load_packed_unit<kUnit>(gradient);
    raw_db = load_packed_unit<kUnit>(gradient + lane.to_second);
    const S* value = (query ? q : k) + lane.at_own;
    raw_a = load_packed_unit<kUnit>(value);
    raw_b = load_packed_unit<kUnit>(value + lane.to_second);
    c = load_unit<kUnit>(norms.cos + lane.at_angle);
    n = load_unit<kUnit>(norms.sin + lane.at_angle);
    factor = (query ? norms.q_factors : norms.k_factors)[lane.at_factor];
  }
  const Unit<kUnit> a = unpack_unit(raw_a), b = unpack_unit(raw_b);
  Unit<kUnit> da = unpack_unit(raw_da), db = unpack_unit(raw_db);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) dot = fmaf(b.x[j], db.x[j], fmaf(a.x[j], da.x[j], dot));
  const float mean = quotient(group_sum(dot, s.group_bits), static_cast<float>(s.D));
  if (!lane.works) return;
#pragma unroll
  for (int j = 0; j < kUnit; ++j)
    pair_backward(da.x[j], db.x[j], a.x[j], b.x[j], c.x[j], n.x[j], quotient(mean, c.x[j] * c.x[j] + n.x[j] * n.x[j]),
                  factor);
  store_unit<kUnit>(gradient, da);
  store_unit<kUnit>(gradient + lane.to_second, db);
}

// body(unit): the pairs of a lane, an integral_constant. Halves of a head are whole vectors of 8 or of 4.
template <class F>
void with_unit(i64 D, F&& body) {
  if (D % 16 == 0) return body(std::integral_constant<int, 8>{});
  body(std::integral_constant<int, 4>{});
}

}  // namespace pgolf::cuda
