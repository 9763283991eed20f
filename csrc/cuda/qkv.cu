// Mixed input, norm, the three projections in one product, head norms and RoPE.
//
// Rounded to S. Forward: normed = rms(m); the product normed·wᵀ of each of q, k, v; q and k after norm and rotation.
// Backward: the gradients of the products; dnormed, their sum over q, k, v; normed, recomputed for the weight
// gradients; dskip; dx. The gradient at m and the norm's backward are not rounded, dx0 takes float32, and a pending
// dskip is added as rounded. With adapters: u, du; u·b is added in float32, and so is du·a, to dnormed as rounded,
// after which that is rounded once more where the sum is a product's.
#include "cuda/adapters.h"
#include "cuda/columns.cuh"
#include "cuda/linear.h"
#include "cuda/sm90/resident_product.cuh"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 N, T, d, H, K, D;
  i64 width;    // of q, k and v side by side
  i64 queries;  // of a sequence: the last of its T positions
  i64 rank;     // of adapters; 0: none
  explicit Dims(const Qkv& op)
      : N(op.k.shape[0] * op.k.shape[1]),
        T(op.k.shape[1]),
        d(op.in.x.shape[2]),
        H(op.q.shape[2]),
        K(op.k.shape[2]),
        D(op.q.shape[3]),
        width((H + 2 * K) * D),
        queries(op.q.shape[1]),
        rank(op.adapters ? op.rank : 0) {}
  i64 query_rows() const { return N / T * queries; }
  Linear linear(DType S) const { return {S, N, d, width}; }
  Adapters<2> adapters(DType S) const { return {S, N / T, T, rank, d, {H * D, K * D}}; }
};

// What of q, k and v a product makes, of which positions.
struct Part {
  i64 rows, T, first;  // tokens; of a sequence; the first one's position
  i64 H, K;            // heads of q, and of k and v
};

struct Saved {
  float *input, *q, *k;  // rms factors
  void* u;               // [N, 2·rank]
  Saved(Layout& layout, DType S, const Dims& s)
      : input(layout.take<float>(s.N)),
        q(layout.take<float>(s.query_rows() * s.H)),
        k(layout.take<float>(s.N * s.K)),
        u(layout.take(S, s.N * 2 * s.rank)) {}
};

// Whether heads are normed and rotated before a product leaves the registers.
bool fuses(const CudaBackend& backend, const Dims& s) {
  using Tiles = sm90::ResidentTiles;
  const bool whole_heads = s.H * s.D % Tiles::kColumns == 0 && s.K * s.D % Tiles::kColumns == 0;
  const bool whole_ranks = s.rank % kVector == 0 && (s.rank == 0 || s.T % 16 == 0);  // Delta::add_to_rows
  return whole_ranks && whole_heads && (s.D == 64 || s.D == 128) && sm90::takes(backend, s.N, s.width, s.d);
}

// Whether mixed_backward adds du·a of adapters (Added), a warp a row.
constexpr int kAddedWidth = 16;
bool adds_in_rows(const CudaBackend& backend, const Dims& s) {
  constexpr i64 kMostWidth = 640;  // for which 64 KiB of shared memory suffice, the least that a GPU has
  return backend.dtype() != DType::f32 && 2 * s.rank == kAddedWidth && s.T % kRowWarps == 0 && s.d % 128 == 0 &&
         s.d <= kMostWidth;
}

struct ForwardScratch {
  void *normed, *packed, *weights;  // [N, d]; [N, width] q, k, v of a token side by side, unless fused; [width, d]
  ForwardScratch(Layout& layout, const CudaBackend& backend, DType S, const Dims& s)
      : normed(layout.take(S, s.N * s.d)),
        packed(layout.take(S, fuses(backend, s) ? 0 : s.N * s.width)),
        weights(layout.take(S, s.width * s.d)) {}
};

struct BackwardScratch {
  void *dnormed, *packed, *weights;  // dnormed becomes normed, row by row
  void* du;                          // [N, 2·rank]
  float* columns;                    // [column_blocks, 3, d] partial gradients of both mixes and the skip weight
  BackwardScratch(Layout& layout, DType S, const Dims& s)
      : dnormed(layout.take(S, s.N * s.d)),
        packed(layout.take(S, s.N * s.width)),
        weights(layout.take(S, s.width * s.d)),
        du(layout.take(S, s.N * 2 * s.rank)),
        columns(layout.take<float>(column_blocks(s.N) * 3 * s.d)) {}
};

bool one_after_the_other(const TensorView& a, const TensorView& b, const TensorView& c) {
  return b.data == a.as<char>() + a.bytes() && c.data == b.as<char>() + b.bytes();
}

// wq, wk and wv as one matrix: where they lie, or copied together.
const void* packed_weights(cudaStream_t stream, const Qkv& op, void* room) {
  if (one_after_the_other(op.wq, op.wk, op.wv)) return op.wq.data;
  char* to = static_cast<char*>(room);
  for (const TensorView* w : {&op.wq, &op.wk, &op.wv}) {
    PGOLF_CUDA(cudaMemcpyAsync(to, w->data, w->bytes(), cudaMemcpyDeviceToDevice, stream));
    to += w->bytes();
  }
  return room;
}

// normed = rms(m). Memory-bound: 2 or 3 reads, 1 write. factors may be null.
template <class S, int kVectors>
__global__ void __launch_bounds__(kRowThreads, 2)
    norm_mixed(Mixed<S> in, Positions positions, i64 rows, int d, int warps, S* __restrict__ normed,
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
  const float factor = rms_factor(team.sum(squares), d);
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

// How lanes share the heads of tokens: a group of lanes does one head, each lane `kUnit` pairs (j, j + D/2). Few and
// small: what a lane must reckon before its first load, the kernels' memory waits for.
struct Heads {
  i64 N;
  int T, first, H, K, D;
  int group_bits;  // lanes of a group: the power of two from D/2/kUnit on
  int center;      // D/2

  Heads(const Part& part, i64 width, int unit)
      : N(part.rows),
        T(int(part.T)),
        first(int(part.first)),
        H(int(part.H)),
        K(int(part.K)),
        D(int(width)),
        group_bits(0),
        center(D / 2) {
    while (unit << group_bits < center) ++group_bits;
  }
  unsigned blocks() const { return blocks_for(N * (H + 2 * K), kRowThreads >> group_bits); }
};

// What one lane works at.
template <int kUnit>
struct HeadLane {
  i64 token;
  int head, pair;  // pair: of its first pair of numbers
  bool works;      // whether it has numbers; all lanes take part in sums
  bool rotates;    // q or k, not v
  i64 at_packed;   // of its first number in [N, (H + 2K)·D]; the second half is `center` further on
  i64 at_own;      // … in q, k or v
  i64 at_factor;   // of the head in [N, H] or [N, K]
  int at_angle;

  __device__ explicit HeadLane(const Heads& s) {
    const unsigned heads = s.H + 2 * s.K;
    const unsigned item = blockIdx.x * (kRowThreads >> s.group_bits) + (threadIdx.x >> s.group_bits);
    pair = static_cast<int>(threadIdx.x & ((1u << s.group_bits) - 1)) * kUnit;
    token = item / heads;
    head = static_cast<int>(item % heads);
    works = token < s.N && pair < s.center;
    if (token >= s.N) token = s.N - 1;
    rotates = head < s.H + s.K;
    at_packed = (token * heads + head) * s.D + pair;
    const int own_heads = head < s.H ? s.H : s.K;
    const int own_head = head < s.H ? head : rotates ? head - s.H : head - s.H - s.K;
    at_factor = token * own_heads + own_head;
    at_own = at_factor * s.D + pair;
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

// What adapters add to the products of q and v: u·bᵀ. The b's of a sequence, [out, rank] in S, are read by all its
// tokens, from the cache.
template <class S>
struct Delta {
  const S *u, *b;    // u: [N, 2·rank]; b: the first sequence's b of q
  i64 step, b_of_v;  // from one sequence's to the next; from q's to v's
  int rank;

  // `column` of the head's product, kUnit numbers
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

  // The same for a warp's 16 rows of one sequence, by matrix instructions: 128 columns of q's product, or of v's. The
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
        multiply_add<S>(x[n], a, *reinterpret_cast<const unsigned*>(at),
                        second ? *reinterpret_cast<const unsigned*>(at + kVector) : 0);
      }
    }
  }
};

// q, k = rope(rms(product)) per head; v is copied. Memory-bound: 1 read, 1 write.
template <class S, int kUnit, bool kAdapted>
__global__ void __launch_bounds__(kRowThreads)
    norm_rotate(Heads s, const S* __restrict__ packed, Delta<S> delta, const float* __restrict__ cos,
                const float* __restrict__ sin, S* __restrict__ q, S* __restrict__ k, S* __restrict__ v,
                float* __restrict__ q_factors, float* __restrict__ k_factors) {
  const HeadLane<kUnit> lane(s);
  Unit<kUnit> a{}, b{}, c, n;
  float squares = 0;
  if (lane.works) {
    a = load_unit<kUnit>(packed + lane.at_packed);
    b = load_unit<kUnit>(packed + lane.at_packed + s.center);
    if (lane.rotates) {
      c = load_unit<kUnit>(cos + lane.at_angle);
      n = load_unit<kUnit>(sin + lane.at_angle);
    }
    if constexpr (kAdapted) {
      if (lane.head < s.H || !lane.rotates) {
        delta.add_to(a, lane, s, lane.pair);
        delta.add_to(b, lane, s, lane.pair + s.center);
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
  store_unit<kUnit>(out + lane.at_own + s.center, b);
}

// The same while the products are in registers, for heads of kWidth numbers; a tile of 128 columns has heads of one
// tensor. The products are rounded as if they had been in memory.
template <class S, int kWidth, bool kAdapted>
struct NormRotate {
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
    requires(kWidth == 64)  // others' angles would not fit beside the products
  {
    return read(row, column);
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpRows& product, i64 row, int column) const {
    (*this)(tile, product, read(row, column), row, column);
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpRows& product, const Angles& angles, i64 row,
                             int column) const {
    auto& x = product[0];
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
    store_rows<S, 128, 1>(tile, product, out, heads * kWidth, 0, static_cast<int>(rows - row), 128);
  }
};

// x / y, rounded as by the operator, for y from 2⁻²⁰ to 2²⁰ and x that is 0 or of 2⁻¹⁰⁰ to 2¹⁰⁰: without its branch for
// other numbers, which makes divisions wait for each other. A smaller x may miss by its last bits; an infinite one
// gives a NaN.
__device__ __forceinline__ float quotient(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  inverse = fmaf(inverse, fmaf(-y, inverse, 1.0f), inverse);
  const float near = x * inverse;
  return fmaf(inverse, fmaf(-y, near, x), near);
}

// The gradients of q, k, v → those of their products, side by side. q and k hold rotated values, whose product with
// the gradient is that of the norm's output and its gradient; the output itself is q rotated back, over cos² + sin²,
// which rounded tables keep only near 1. Memory-bound: 2 reads, 1 write; all reads are under way before the first is
// used.
template <class S, int kUnit>
__global__ void __launch_bounds__(kRowThreads, 4)
    norm_rotate_backward(Heads s, const S* __restrict__ q, const S* __restrict__ k, const S* __restrict__ dq,
                         const S* __restrict__ dk, const S* __restrict__ dv, const float* __restrict__ cos,
                         const float* __restrict__ sin, const float* __restrict__ q_factors,
                         const float* __restrict__ k_factors, S* __restrict__ packed) {
  const HeadLane<kUnit> lane(s);
  const bool query = lane.head < s.H;
  PackedUnit<kUnit, S> raw_a{}, raw_b{}, raw_da{}, raw_db{};
  Unit<kUnit> c, n;
  float dot = 0, factor = 0;
  if (lane.works) {
    const S* gradient = (query ? dq : lane.rotates ? dk : dv) + lane.at_own;
    raw_da = load_packed_unit<kUnit>(gradient);
    raw_db = load_packed_unit<kUnit>(gradient + s.center);
    if (lane.rotates) {
      const S* value = (query ? q : k) + lane.at_own;
      raw_a = load_packed_unit<kUnit>(value);
      raw_b = load_packed_unit<kUnit>(value + s.center);
      c = load_unit<kUnit>(cos + lane.at_angle);
      n = load_unit<kUnit>(sin + lane.at_angle);
      factor = (query ? q_factors : k_factors)[lane.at_factor];
    }
  }
  const Unit<kUnit> a = unpack_unit(raw_a), b = unpack_unit(raw_b);
  Unit<kUnit> da = unpack_unit(raw_da), db = unpack_unit(raw_db);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) dot = fmaf(b.x[j], db.x[j], fmaf(a.x[j], da.x[j], dot));
  const float mean = quotient(group_sum(dot, s.group_bits), static_cast<float>(s.D));
  if (!lane.works) return;
  if (lane.rotates) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const float share = quotient(mean, c.x[j] * c.x[j] + n.x[j] * n.x[j]);
      const float u = da.x[j] - share * a.x[j], w = db.x[j] - share * b.x[j];
      da.x[j] = factor * (u * c.x[j] - w * n.x[j]);
      db.x[j] = factor * (w * c.x[j] + u * n.x[j]);
    }
  }
  store_unit<kUnit>(packed + lane.at_packed, da);
  store_unit<kUnit>(packed + lane.at_packed + s.center, db);
}

// What is added to dx at the end.
enum class Pending { none, stored, stored_f32, dskip, dx0 };

struct InputGrads {
  void *dx, *dskip;  // S
  float* dx0;
  const void* pending;
  Pending kind;
};
InputGrads input_grads(const QkvGrads& grads) {
  InputGrads g{grads.dx.data, grads.dskip ? grads.dskip.data : nullptr, grads.dx0.as<float>(), grads.pending.data,
               Pending::none};
  if (grads.pending)
    g.kind = g.pending == g.dx0                      ? Pending::dx0
             : g.pending == g.dskip                  ? Pending::dskip
             : grads.pending.dtype == grads.dx.dtype ? Pending::stored
                                                     : Pending::stored_f32;
  return g;
}

// What adapters add to dnormed, du·a, for 2·rank = 16: of the rows of a block's turn, one a warp. Each warp makes a
// slice of the columns of all of them by matrix instructions, and the rows' own warps read the sums in shared memory.
// The rows of a turn are of one sequence, and those of a block stand together: its a's, there as well, seldom change.
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

  // Begins the turn of the rows from `base` on.
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
  // The sums for this warp's row, until the turn after the next. For all threads of the block.
  __device__ const float* sums() {
    float* const here = room_ + turn_ * kRowWarps * Of::stride(d_);
    turn_ ^= 1;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 16 >= d_ / kRowWarps) break;
      const uint4 a = own_a_[tile * kRowThreads];
      float c[4] = {};
      multiply_add<S>(c, {a.x, a.y, a.z, a.w}, du_[0], du_[1]);
      // The columns of c are rows of the turn; its rows g and g + 8 are columns next to each other.
      float* const at = here + lane_column(0) * Of::stride(d_) + column(tile);
      *reinterpret_cast<float2*>(at) = {c[0], c[2]};
      *reinterpret_cast<float2*>(at + Of::stride(d_)) = {c[1], c[3]};
    }
    __syncthreads();  // two turns alternate: who writes where this one was has passed the next barrier
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
// Few warps fit beside each other, so all of a row is under way before any of it is used.
// dx0 may be null; kSums: the gradients of the vectors are summed; kAdds: adapters add to dnormed.
template <class S, int kVectors, bool kSkip, bool kSums, bool kAdds>
__global__ void __launch_bounds__(kRowThreads, kVectors * sizeof(S) <= 4 && !(kSums && kSkip) ? 2 : 1)
    mixed_backward(Mixed<S> in, i64 rows, int d, int warps, const float* __restrict__ factors, S* dnormed_to_normed,
                   InputGrads grads, float* __restrict__ partials, const __grid_constant__ Added<S> added) {
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
    const float mean = team.sum(dot) / static_cast<float>(d);
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

// normed = rms(m) of `rows` tokens, of each sequence those from position `first` on.
template <class S>
void norm_input(cudaStream_t stream, const Qkv& op, const Dims& s, i64 rows, i64 first, void* normed, float* factors) {
  with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
    norm_mixed<S, vectors><<<row_blocks(rows, warps), kRowThreads, 0, stream>>>(
        Mixed<S>(op.in), Positions{0, static_cast<unsigned>(s.T), static_cast<unsigned>(first)}, rows,
        static_cast<int>(s.d), warps, static_cast<S*>(normed), factors);
    PGOLF_LAUNCHED("norm_mixed");
  });
}

// body(unit): the pairs of a lane, an integral_constant. Halves of a head are whole vectors of 8 or of 4.
template <class F>
void with_unit(i64 D, F&& body) {
  if (D % 16 == 0) return body(std::integral_constant<int, 8>{});
  body(std::integral_constant<int, 4>{});
}

}  // namespace

OpBytes CudaBackend::bytes(const Qkv& op) const {
  const Dims s(op);
  require(s.D % 8 == 0 && s.D <= 256, "A head has ", s.D,
          " numbers; the CUDA backend needs a multiple of 8, and at most 256.");
  require(s.rank == 0 || s.queries == s.T, "Adapters take queries of all ", s.T, " positions, not of ", s.queries, ".");
  Layout saved, forward, backward;
  Saved(saved, storage_, s);
  ForwardScratch(forward, *this, storage_, s);
  BackwardScratch(backward, storage_, s);
  return {saved.used(), forward.used(), backward.used()};
}

void CudaBackend::qkv_forward(const Qkv& op) {
  const Dims s(op);
  Layout saved_layout(op.saved.data), scratch_layout(op.scratch.data);
  const Saved saved(saved_layout, storage_, s);
  const ForwardScratch scratch(scratch_layout, *this, storage_, s);
  const char* weights = static_cast<const char*>(packed_weights(stream(), op, scratch.weights));
  const Adapters<2> adapters = s.adapters(storage_);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    const auto norm = [&](i64 rows, i64 first) {
      norm_input<S>(stream(), op, s, rows, first, scratch.normed, saved.input);
    };
    // Heads from the product of normed with the rows of the packed weights from `weight_row` on.
    const auto project = [&](const Part& part, i64 weight_row) {
      const void* w = weights + static_cast<std::size_t>(weight_row * s.d) * sizeof(S);
      const i64 width = (part.H + 2 * part.K) * s.D;
      const Delta<S> delta{static_cast<const S*>(saved.u), op.adapters.as<S>() + adapters.b_at(0), adapters.size(),
                           adapters.b_at(1) - adapters.b_at(0), static_cast<int>(s.rank)};
      if (s.rank) gemm(adapters.down(scratch.normed, op.adapters.data, saved.u));
      if constexpr (sizeof(S) == 2) {
        const auto fused = [&](auto head_width, auto adapted) {
          sm90::launch_resident_product<S>(
              *this, "qkv", scratch.normed, w, part.rows, width, s.d,
              NormRotate<S, head_width(), adapted()>{part.rows, int(part.T), int(part.first), int(part.H), int(part.K),
                                                     op.cos.as<float>(), op.sin.as<float>(), op.q.as<S>(), op.k.as<S>(),
                                                     op.v.as<S>(), saved.q, saved.k, delta});
        };
        const auto fused_heads = [&](auto adapted) {
          if (s.D == 64) return fused(std::integral_constant<int, 64>{}, adapted);
          fused(std::integral_constant<int, 128>{}, adapted);
        };
        if (fuses(*this, s)) return s.rank ? fused_heads(std::true_type{}) : fused_heads(std::false_type{});
      }
      gemm(Linear{storage_, part.rows, s.d, width}.forward(scratch.normed, w, scratch.packed, storage_));
      with_unit(s.D, [&](auto unit) {
        const auto launch = [&](auto adapted) {
          const Heads heads(part, s.D, unit);
          norm_rotate<S, unit, adapted><<<heads.blocks(), kRowThreads, 0, stream()>>>(
              heads, static_cast<const S*>(scratch.packed), delta, op.cos.as<float>(), op.sin.as<float>(), op.q.as<S>(),
              op.k.as<S>(), op.v.as<S>(), saved.q, saved.k);
          PGOLF_LAUNCHED("norm_rotate");
        };
        if (s.rank)
          launch(std::true_type{});
        else
          launch(std::false_type{});
      });
    };
    norm(s.N, 0);
    if (s.queries == s.T) return project({s.N, s.T, 0, s.H, s.K}, 0);
    project({s.N, s.T, 0, 0, s.K}, s.H * s.D);
    norm(s.query_rows(), s.T - s.queries);
    project({s.query_rows(), s.queries, s.T - s.queries, s.H, 0}, 0);
  });
}

void CudaBackend::qkv_backward(const Qkv& op, const QkvGrads& grads) {
  const Dims s(op);
  Layout saved_layout(op.saved.data), scratch_layout(grads.scratch.data);
  const Saved saved(saved_layout, storage_, s);
  const BackwardScratch scratch(scratch_layout, storage_, s);
  const Adapters<2> adapters = s.adapters(storage_);
  const char* const packed_v =
      static_cast<const char*>(scratch.packed) + static_cast<std::size_t>((s.H + s.K) * s.D) * size_of(storage_);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    with_unit(s.D, [&](auto unit) {
      const Heads heads({s.N, s.T, 0, s.H, s.K}, s.D, unit);
      norm_rotate_backward<S, unit><<<heads.blocks(), kRowThreads, 0, stream()>>>(
          heads, op.q.as<S>(), op.k.as<S>(), grads.dq.as<S>(), grads.dk.as<S>(), grads.dv.as<S>(), op.cos.as<float>(),
          op.sin.as<float>(), saved.q, saved.k, static_cast<S*>(scratch.packed));
      PGOLF_LAUNCHED("norm_rotate_backward");
    });
    if (s.rank) {
      gemm(adapters.up_backward(0, scratch.packed, s.width, op.adapters.data, scratch.du));
      gemm(adapters.up_backward(1, packed_v, s.width, op.adapters.data, scratch.du));
    }
    if (!grads.dx) return norm_input<S>(stream(), op, s, s.N, 0, scratch.dnormed, nullptr);
    gemm(s.linear(storage_).backward(scratch.packed, packed_weights(stream(), op, scratch.weights), scratch.dnormed));
    const bool adds = s.rank && adds_in_rows(*this, s);
    if (s.rank && !adds) gemm(adapters.down_backward(scratch.du, op.adapters.data, scratch.dnormed));
    const i64 blocks = column_blocks(s.N);
    const Added<S> added{static_cast<const S*>(scratch.du), op.adapters.as<S>(), adapters.size(),
                         (s.N / kRowWarps + blocks - 1) / blocks * kRowWarps, static_cast<int>(s.T)};
    // The column sums leave a thread room for two or three vectors.
    with_row_team<sizeof(S) == 4 ? 2 : 3>(s.d, [&](auto vectors, int warps) {
      const auto launch = [&](auto skips, auto sums, auto adding) {
        const auto kernel = mixed_backward<S, vectors, skips, sums, adding>;
        const int d = static_cast<int>(s.d), shared = d * int(sizeof(float)) + (adding ? Added<S>::bytes(d) : 0);
        if (adding) PGOLF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        kernel<<<static_cast<unsigned>(blocks), kRowThreads, shared, stream()>>>(
            Mixed<S>(op.in), s.N, d, warps, saved.input, static_cast<S*>(scratch.dnormed), input_grads(grads),
            scratch.columns, added);
        PGOLF_LAUNCHED("mixed_backward");
      };
      const auto choose = [&](auto skips, auto sums) {
        if constexpr (sizeof(S) == 2)
          if (adds) return launch(skips, sums, std::true_type{});
        launch(skips, sums, std::false_type{});
      };
      const auto choose_sums = [&](auto skips) {
        if (grads.resid_mix) return choose(skips, std::true_type{});
        choose(skips, std::false_type{});
      };
      if (op.in.skip) return choose_sums(std::true_type{});
      choose_sums(std::false_type{});
    });
  });
  if (grads.dx && grads.resid_mix)
    add_columns(stream(), scratch.columns, column_blocks(s.N), 3 * s.d, (op.in.skip ? 3 : 2) * s.d,
                grads.resid_mix.as<float>(), 2 * s.d, grads.skip_weight.as<float>());
  if (grads.adapters) {
    gemm(adapters.a_gradient(scratch.du, scratch.dnormed, grads.adapters.data));
    gemm(adapters.b_gradient(0, scratch.packed, s.width, saved.u, grads.adapters.data));
    gemm(adapters.b_gradient(1, packed_v, s.width, saved.u, grads.adapters.data));
  }
  if (!grads.wq) return;

  // The three weight gradients, together where they lie together.
  const auto weight_gradient = [&](const TensorView& w, i64 from, i64 rows) {
    Linear part = s.linear(storage_);
    part.out = rows;
    gemm(part.weights(static_cast<const char*>(scratch.packed) + static_cast<std::size_t>(from) * size_of(storage_),
                      scratch.dnormed, w.data));
  };
  if (one_after_the_other(grads.wq, grads.wk, grads.wv)) return weight_gradient(grads.wq, 0, s.width);
  weight_gradient(grads.wq, 0, s.H * s.D);
  weight_gradient(grads.wk, s.H * s.D, s.K * s.D);
  weight_gradient(grads.wv, (s.H + s.K) * s.D, s.K * s.D);
}

}  // namespace pgolf::cuda
