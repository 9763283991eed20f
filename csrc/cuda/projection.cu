// Projections back into the residual stream. Their scale is part of w, so that all are plain GEMMs onto the residual.
// The slope of an MLP's activation, on the way back to an MLP's hidden values. And the bare GEMM.
//
// Rounded to S. Forward onto x: out. Forward onto the mixed input: first the GEMM a·wᵀ, which is small against the
// residual, then out, of the positions that it has. Backward: da; where it is to be the gradient before an activation,
// the one at h is rounded as well unless the slope is in the GEMM's epilogue.
#include "cuda/elementwise.cuh"
#include "cuda/gemm_args.h"
#include "cuda/row_ops.cuh"
#include "cuda/sm90/weight_stationary_gemm.cuh"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 N, d, c;
  explicit Dims(const ProjectResidual& op) : N(op.out.shape[0] * op.out.shape[1]), d(op.w.shape[0]), c(op.w.shape[1]) {}
  Linear linear(DType S) const { return {S, N, c, d}; }
};

// Adds the mixed input to what is to become eight columns of a row of out.
template <class S>
struct AddResidualMix {
  Mixed<S> in;
  Positions positions;  // of the rows of out
  i64 rows;
  int d;
  S* out;

  __device__ void operator()(i64 row, int column, Vector8 sum) const {
    const i64 at = positions.token(row) * d + column;
    const Vector8 x0 = load8(in.x0 + at);
    Vector8 m = load8(in.x + at);
    if (in.skip) m = in.skipped(m, load8(in.skip + at), column);
    m = in.mix(m, x0, column);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum.x[j] += m.x[j];
    store8(out + row * d + column, sum);
  }
};

// The same as an epilogue. Few warps can hide its latency: what they read has been prefetched into L2, and each warp
// has the loads of kAtOnce vectors in flight.
template <class S>
struct AddResidualMixEpilogue {
  static constexpr int kAtOnce = 4;
  AddResidualMix<S> add;
  CUtensorMap x, x0, skip;  // of all tokens, in boxes of a tile's rows

  // Where the rows of a tile are of two sequences, the second one's may not be those that are prefetched.
  __device__ void prefetch(i64 row, int first_column) const {
    const int token = static_cast<int>(add.positions.token(row));
    for (int column = first_column; column < first_column + sm90::GemmTiles::kColumns; column += sm90::kBoxColumns) {
      sm90::tma_prefetch_l2(&x, column, token, 0);
      sm90::tma_prefetch_l2(&x0, column, token, 0);
      if (add.in.skip) sm90::tma_prefetch_l2(&skip, column, token, 0);
    }
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpAccumulator& accumulator, i64 first_row,
                             int first_column) const {
    using Tile = SharedTile<128>;
    constexpr int kPassRows = kWarp / Tile::kChunks;
    round_rows<S, 128, 1>(tile, accumulator);
    const Mixed<S>& in = add.in;
    const int lane_row = threadIdx.x % kWarp / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    const int column = first_column + chunk * kVector;
    const Vector8 mix0 = load8(in.mix0 + column), mix1 = load8(in.mix1 + column);
    const Vector8 weight = in.skip ? load8(in.weight + column) : Vector8{};
    const i64 lanes_row = first_row + threadIdx.x % 16;  // whose token other lanes get by shuffles
    const unsigned lanes_token =
        static_cast<unsigned>(add.positions.token(lanes_row < add.rows ? lanes_row : add.rows - 1));
#pragma unroll
    for (int begin = 0; begin < 16; begin += kAtOnce * kPassRows) {
      Packed8<S> x[kAtOnce], x0[kAtOnce], skip[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned token = __shfl_sync(0xffffffffu, lanes_token, begin + i * kPassRows + lane_row);
        const i64 at = i64{token} * add.d + column;
        x[i] = load_packed(in.x + at);
        x0[i] = load_packed(in.x0 + at);
        if (in.skip) skip[i] = load_packed(in.skip + at);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile_row = begin + i * kPassRows + lane_row;
        Vector8 m = unpack(x[i]);
        Vector8 sum = unpack(Packed8<S>{*reinterpret_cast<const uint4*>(tile + Tile::offset(tile_row, chunk))});
        if (in.skip) m = in.skipped(m, unpack(skip[i]), weight);
        m = in.mix(m, unpack(x0[i]), mix0, mix1);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum.x[j] += m.x[j];
        if (first_row + tile_row < add.rows) store8(add.out + (first_row + tile_row) * add.d + column, sum);
      }
    }
  }
};

// out += the mixed input. Memory-bound: 3 or 4 reads, 1 write.
template <class S>
__global__ void __launch_bounds__(kElementThreads) add_residual_mix(AddResidualMix<S> add) {
  const i64 index = i64{blockIdx.x} * kElementThreads + threadIdx.x;
  const unsigned vectors = static_cast<unsigned>(add.d / kVector);
  if (index >= add.rows * vectors) return;
  const unsigned row = static_cast<unsigned>(index) / vectors;
  const int column = static_cast<int>(static_cast<unsigned>(index) % vectors) * kVector;
  add(row, column, load8<S>(add.out + i64{row} * add.d + column));
}

// SquaredRelu's slope, from its value and the sign of u.
struct Slope {
  float scale, below;             // 0 and −negative_slope
  const unsigned char* negative;  // null: none is
  explicit Slope(const SquaredRelu& f)
      : scale(static_cast<float>(f.scale)),
        below(static_cast<float>(-f.negative_slope)),
        negative(f.negative.as<unsigned char>()) {}
};

// The gradient at h → that at u. Memory-bound: 2 reads, 1 write.
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    square_relu_backward(S* dh_to_du, const S* h, i64 count, Slope slope) {
  const i64 byte = i64{blockIdx.x} * kElementThreads + threadIdx.x;
  const unsigned negative = slope.negative && byte * kVector < count ? slope.negative[byte] : 0;
  for_each_element<S>(dh_to_du, h, count, [=](float dh, float at, int j) {
    const float du = dh * (2.0f * sqrtf(slope.scale * at));
    return negative >> j & 1 ? slope.below * du : du;
  });
}

// The same as an epilogue: the accumulator is the gradient at h. kSigns: slope.negative is there; a template, as a
// branch on it costs the one without signs 800 bytes of spills.
template <class S, bool kSigns>
struct SquareReluBackwardEpilogue {
  using Tile = SharedTile<128>;
  static constexpr int kPassRows = kWarp / Tile::kChunks, kPasses = 16 / kPassRows;
  struct Ahead {
    Packed8<S> h[kPasses];
    unsigned char negative[kSigns ? kPasses : 1];
  };
  const S* h;  // [rows, F]
  S* du;
  i64 rows, F;
  Slope slope;

  __device__ Ahead ahead(i64 first_row, int first_column) const {
    const int lane_row = threadIdx.x % kWarp / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    Ahead read;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const i64 own = first_row + i * kPassRows + lane_row;
      const i64 at = (own < rows ? own : rows - 1) * F + first_column + chunk * kVector;
      read.h[i] = load_packed(h + at);
      if constexpr (kSigns) read.negative[i] = slope.negative[at / kVector];
    }
    return read;
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpAccumulator& accumulator, const Ahead& read, i64 row,
                             int column) const {
    const int pass_row = threadIdx.x % kWarp / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      uint4 numbers = read.h[i].piece[0];
      if constexpr (kSigns) numbers = with_signs(numbers, read.negative[i]);  // h's sign bits are u's
      *reinterpret_cast<uint4*>(tile + Tile::offset(i * kPassRows + pass_row, chunk)) = numbers;
    }
    __syncwarp();
    const auto slope_at = [&](float at) {
      const float above = 2.0f * sqrt_approximate(slope.scale * (kSigns ? fabsf(at) : at));
      return kSigns && __float_as_int(at) < 0 ? slope.below * above : above;
    };
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const auto at = tile + Tile::offset(lane_row(i), n) + lane_column(i) * sizeof(S);
        const float2 here = unpack<S>(*reinterpret_cast<const unsigned*>(at));
        accumulator[0][n][i] *= slope_at(here.x);
        accumulator[0][n][i + 1] *= slope_at(here.y);
      }
    store_rows<S, 128, 1>(tile, accumulator, du + row * F + column, static_cast<int>(F), 0,
                          static_cast<int>(rows - row), 128);
  }
};

}  // namespace

OpBytes CudaBackend::project_residual_bytes(const ProjectResidual&) const { return {}; }

void CudaBackend::project_residual_forward(const ProjectResidual& op) {
  const Dims s(op);
  Gemm product = s.linear(storage_).forward(op.a.data, op.w.data, op.out.data, storage_);
  if (!op.mixed.x) {
    product.c = op.x.data;
    product.beta = 1.0f;
    return gemm(product);
  }
  require(s.d % kVector == 0, "A row has ", s.d, " numbers; the CUDA backend needs a multiple of ", kVector, ".");
  const i64 T = op.mixed.x.shape[1];
  const Positions positions{0, static_cast<unsigned>(T), static_cast<unsigned>(T - op.out.shape[1])};
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    const auto tiles = [&](const TensorView& of) {
      return sm90::tensor_map(of.data, storage_, 1, of.shape[0] * T, s.d, sm90::GemmTiles::kRows);
    };
    const AddResidualMix<S> add{Mixed<S>(op.mixed), positions, s.N, static_cast<int>(s.d), op.out.as<S>()};
    if constexpr (sizeof(S) == 2)
      if (sm90::gemm_fits(*this, s.N, s.d, s.c))
        return sm90::launch_weight_stationary_gemm<S>(
            *this, "attention_out", op.a.data, op.w.data, s.N, s.d, s.c,
            AddResidualMixEpilogue<S>{add, tiles(op.mixed.x), tiles(op.mixed.x0),
                                      op.mixed.skip ? tiles(op.mixed.skip) : CUtensorMap{}});
    gemm(product);
    add_residual_mix<S><<<element_blocks(s.N * s.d), kElementThreads, 0, stream()>>>(add);
    PGOLF_LAUNCHED("add_residual_mix");
  });
}

void CudaBackend::project_residual_backward(const ProjectResidual& op, const ProjectResidualGrads& grads) {
  const Dims s(op);
  const bool slopes = grads.activation.scale > 0;
  const Slope slope(grads.activation);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    if constexpr (sizeof(S) == 2)
      if (slopes && sm90::gemm_fits(*this, s.N, s.c, s.d)) {
        const auto multiply = [&](auto signs) {
          sm90::launch_weight_stationary_gemm<S, sm90::Major::mn>(
              *this, "mlp_out_backward", grads.dout.data, op.w.data, s.N, s.c, s.d,
              SquareReluBackwardEpilogue<S, signs()>{op.a.as<S>(), grads.da.as<S>(), s.N, s.c, slope});
        };
        return slope.negative ? multiply(std::true_type{}) : multiply(std::false_type{});
      }
    gemm(s.linear(storage_).backward(grads.dout.data, op.w.data, grads.da.data));
    if (!slopes) return;
    square_relu_backward<S>
        <<<element_blocks(s.N * s.c), kElementThreads, 0, stream()>>>(grads.da.as<S>(), op.a.as<S>(), s.N * s.c, slope);
    PGOLF_LAUNCHED("square_relu_backward");
  });
  if (grads.w) gemm(s.linear(storage_).weights(grads.dout.data, op.a.data, grads.w.data));
}

void CudaBackend::product(const TensorView& a, const TensorView& b, const TensorView& out) {
  gemm(Linear{storage_, a.shape[0], a.shape[1], b.shape[0]}.forward(a.data, b.data, out.data, storage_));
}

}  // namespace pgolf::cuda
