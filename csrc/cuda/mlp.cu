// Norm, the first MLP GEMM and its activation. Its slope is projection.cu's, from h: u itself is not kept.
//
// Rounded to S. Forward: normed = rms(x), unless the GEMM is x·wᵀ, whose rows the epilogue multiplies by their rms
// factors; h, whose value in f16 stays at the largest finite number.
// Backward: dnormed = du·w; normed, recomputed for the weight gradient; dx. The norm's backward uses normed before
// it is rounded.
#include "cuda/elementwise.cuh"
#include "cuda/gemm_args.h"
#include "cuda/row_ops.cuh"
#include "cuda/sm90/weight_stationary_gemm.cuh"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 N, T, d, F;
  explicit Dims(const MlpUp& op)
      : N(op.x.shape[0] * op.x.shape[1]), T(op.x.shape[1]), d(op.x.shape[2]), F(op.w.shape[0]) {}
  Linear linear(DType S) const { return {S, N, d, F}; }
};

constexpr float kHalfMax = 65504.0f;

// Rows whose u, float32, is computed at a time: the kernel that squares it reads it from L2 (50 MB on Hopper). A
// multiple of the tile's 256 rows. 5,632 rows at F = 1,536 are two waves of 132 tiles of 256×128.
constexpr i64 kTileRows = 256;
i64 rows_at_once(const Dims& s) {
  constexpr i64 kBytes = 35'000'000;
  const i64 rows = kBytes / (static_cast<i64>(sizeof(float)) * s.F) / kTileRows * kTileRows;
  return std::min(s.N, std::max(rows, kTileRows));
}

struct Activation {
  float scale, slope;
  unsigned char* negative;  // null: nobody wants the signs
  explicit Activation(const SquaredRelu& f)
      : scale(static_cast<float>(f.scale)),
        slope(static_cast<float>(f.negative_slope)),
        negative(f.negative.as<unsigned char>()) {}
};

// f(u) for numbers of one thread, and how many of them f16 cannot hold. A NaN stays one.
template <class S>
class SquareRelu {
 public:
  __device__ explicit SquareRelu(const Activation& f) : scale_(f.scale), slope_(f.slope) {}
  __device__ float operator()(float u) {
    const float relu = u < 0 ? slope_ * u : u, square = scale_ * (relu * relu);
    if (!std::is_same_v<S, half> || !(square > kHalfMax)) return square;
    ++found_;
    return kHalfMax;
  }
  __device__ void count_in(std::int64_t* saturated) const {  // whole numbers: their order does not matter
    if (std::is_same_v<S, half> && found_ && saturated)
      atomicAdd(reinterpret_cast<unsigned long long*>(saturated), static_cast<unsigned long long>(found_));
  }

 private:
  float scale_, slope_;
  unsigned found_ = 0;
};

// h from u. Memory-bound: 1 write, and 1 read from L2.
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    square_relu(const float* u, S* h, i64 count, Activation f, std::int64_t* saturated) {
  SquareRelu<S> square(f);
  unsigned below = 0;
  for_each_element<S>(h, u, count, [&](float, float at, int j) {
    below |= unsigned(at < 0) << j;
    return square(at);
  });
  const i64 byte = i64{blockIdx.x} * kElementThreads + threadIdx.x;
  if (f.negative && byte * kVector < count) f.negative[byte] = static_cast<unsigned char>(below);
  square.count_in(saturated);
}

// The same as an epilogue: the accumulator is x·wᵀ.
template <class S>
struct SquareReluEpilogue {
  struct Factors {
    float of_row[2];  // of a lane
  };
  const float* factors;  // [rows]
  S* h;                  // [rows, F]
  i64 rows, F;
  Activation f;
  std::int64_t* saturated;

  __device__ Factors ahead(i64 row, int) const {
    Factors read;
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const i64 own = row + lane_row(2 * half_row);
      read.of_row[half_row] = factors[own < rows ? own : rows - 1];
    }
    return read;
  }
  __device__ void operator()(unsigned char* tile, sm90::WarpAccumulator& u, const Factors& read, i64 row,
                             int column) const {
    SquareRelu<S> square(f);
    if (f.negative) return store_with_signs(tile, u, read, square, row, column);
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) u[0][n][i] = square(read.of_row[i / 2] * u[0][n][i]);
    square.count_in(saturated);
    store_rows<S, 128, 1>(tile, u, h + row * F + column, static_cast<int>(F), 0, static_cast<int>(rows - row), 128);
  }

 private:
  // On the way through the tile, h's sign bits are u's.
  __device__ void store_with_signs(unsigned char* tile, sm90::WarpAccumulator& u, const Factors& read,
                                   SquareRelu<S>& square, i64 row, int column) const {
    using Tile = SharedTile<128>;
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float at = read.of_row[i / 2] * u[0][n][i], value = square(at);
        u[0][n][i] = at < 0 ? -value : value;
      }
    square.count_in(saturated);
    round_rows<S, 128, 1>(tile, u);
#pragma unroll
    for (int i = 0; i < 16 * Tile::kChunks / kWarp; ++i) {
      const unsigned index = i * kWarp + threadIdx.x % kWarp;
      const int tile_row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (row + tile_row >= rows) break;
      uint4 numbers = *reinterpret_cast<const uint4*>(tile + Tile::offset(tile_row, chunk));
      const i64 at = (row + tile_row) * F + column + chunk * kVector;
      f.negative[at / kVector] = static_cast<unsigned char>(take_signs(numbers));
      *reinterpret_cast<uint4*>(h + at) = numbers;
    }
  }
};

}  // namespace

OpBytes CudaBackend::mlp_up_bytes(const MlpUp& op) const {
  const Dims s(op);
  Layout saved, forward, backward;
  saved.take<float>(s.N);  // rms factors
  if (!sm90::gemm_fits(*this, s.N, s.F, s.d)) {
    forward.take(storage_, s.N * s.d);           // normed
    forward.take<float>(rows_at_once(s) * s.F);  // u
  }
  backward.take(storage_, s.N * s.d);  // dnormed, then normed
  return {saved.used(), forward.used(), backward.used()};
}

void CudaBackend::mlp_up_forward(const MlpUp& op) {
  const Dims s(op);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    float* const factors = op.saved.as<float>();
    Activation f(op.activation);
    const auto norm = [&](S* normed) {
      with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
        norm_rows<S, vectors><<<row_blocks(s.N, warps), kRowThreads, 0, stream()>>>(
            op.x.as<S>(), Positions{}, s.N, static_cast<int>(s.d), warps, static_cast<float>(op.norm_scale), normed,
            factors);
        PGOLF_LAUNCHED("norm_rows");
      });
    };
    if constexpr (sizeof(S) == 2)
      if (sm90::gemm_fits(*this, s.N, s.F, s.d)) {
        norm(nullptr);
        return sm90::launch_weight_stationary_gemm<S>(
            *this, "mlp_up", op.x.data, op.w.data, s.N, s.F, s.d,
            SquareReluEpilogue<S>{factors, op.h.as<S>(), s.N, s.F, f, op.saturated});
      }
    Layout scratch(op.scratch.data);
    S* const normed = scratch.take<S>(s.N * s.d);
    norm(normed);
    float* const u = scratch.take<float>(rows_at_once(s) * s.F);
    for (i64 row = 0; row < s.N; row += rows_at_once(s)) {
      const i64 rows = std::min(rows_at_once(s), s.N - row);
      gemm(Linear{storage_, rows, s.d, s.F}.forward(normed + row * s.d, op.w.data, u, DType::f32));
      static_assert(kTileRows % kVector == 0, "signs of rows computed at a time begin with a byte");
      if (f.negative) f.negative = op.activation.negative.as<unsigned char>() + row * s.F / kVector;
      square_relu<S><<<element_blocks(rows * s.F), kElementThreads, 0, stream()>>>(u, op.h.as<S>() + row * s.F,
                                                                                   rows * s.F, f, op.saturated);
      PGOLF_LAUNCHED("square_relu");
    }
  });
}

void CudaBackend::mlp_up_backward(const MlpUp& op, const MlpUpGrads& grads) {
  const Dims s(op);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    gemm(s.linear(storage_).backward(grads.du.data, op.w.data, grads.scratch.data));
    with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
      norm_rows_backward<S, vectors, true><<<row_blocks(s.N, warps), kRowThreads, 0, stream()>>>(
          op.x.as<S>(), Positions{}, op.saved.as<float>(), s.N, static_cast<int>(s.d), warps,
          static_cast<float>(op.norm_scale), grads.scratch.as<S>(), grads.dx.as<S>(), static_cast<bool>(grads.w));
      PGOLF_LAUNCHED("norm_rows_backward");
    });
  });
  if (grads.w) gemm(s.linear(storage_).weights(grads.du.data, grads.scratch.data, grads.w.data));
}

}  // namespace pgolf::cuda
