// What a step does to weights besides its optimizer: working copies, the gradients of projections, quantised rows.
// All of it is memory-bound, a warp a row. Divisions are IEEE's and roundings go half to even, as on the CPU.
#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kRows = kThreads / kWarp;  // of a block

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ i64 row_in(unsigned block) { return i64{block} * kRows + threadIdx.x / kWarp; }

// A lane's neighbours in a row: eight, or one where the row's length is not a multiple of eight.
template <int kCount>
struct Piece {
  float x[kCount];

  Piece() = default;
  template <class S>
  __device__ __forceinline__ explicit Piece(const S* from) {
    if constexpr (kCount == kVector) {
      const Vector8 v = load8(from);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = v.x[i];
    } else {
      x[0] = to_float(from[0]);
    }
  }
  template <class S>
  __device__ __forceinline__ void store(S* to) const {
    if constexpr (kCount == kVector) {
      Vector8 v;
#pragma unroll
      for (int i = 0; i < kCount; ++i) v.x[i] = x[i];
      store8(to, v);
    } else {
      to[0] = from_float<S>(x[0]);
    }
  }
};

// Calls body(j, size) for the lane's pieces of a row, which begin at j; `size` is their kCount as a type.
template <class F>
__device__ __forceinline__ void for_pieces(i64 cols, F&& body) {
  if (cols % kVector == 0) {
#pragma unroll 2
    for (i64 j = lane() * kVector; j < cols; j += kWarp * kVector) body(j, std::integral_constant<int, kVector>());
  } else {
    for (i64 j = lane(); j < cols; j += kWarp) body(j, std::integral_constant<int, 1>());
  }
}

// clamp(round(w/σ), −c−1, c)
__device__ __forceinline__ float quantum(float w, float sigma, float clip) {
  const float n = rintf(__fdiv_rn(w, sigma));
  return n > clip ? clip : n < -clip - 1.0f ? -clip - 1.0f : n;
}

// Late QAT's levels of one row, in float32 as the artifact's: values go through `level`. No levels where the limit is
// 0.
struct Levels {
  float clip, sigma = 1.0f;

  __device__ Levels(const float* row, i64 cols, int limit) : clip(static_cast<float>(limit)) {
    if (limit == 0) return;
    float top = 0;
    for_pieces(cols, [&](i64 j, auto size) {
      const Piece<size()> w(row + j);
#pragma unroll
      for (float x : w.x) top = fmaxf(top, fabsf(x));
    });
    sigma = fmaxf(__fdiv_rn(warp_max(top), clip), 1e-12f);
  }
  __device__ __forceinline__ float level(float w) const { return clip == 0 ? w : quantum(w, sigma, clip) * sigma; }
};

struct CopyEntry {
  const float *w, *scale;  // scale may be null
  void* out;
  i64 rows, cols;
  float factor;
  int clip;
};

// 1 read (2 where rows are quantised, the second from L2), 1 write of S.
template <class S>
__global__ void __launch_bounds__(kThreads) make_working_copies(const __grid_constant__ TensorList<CopyEntry> copies) {
  const int index = copies.entry_of(blockIdx.x);
  const CopyEntry& copy = copies.entries[index];
  const i64 row = row_in(blockIdx.x - copies.first[index]);
  if (row >= copy.rows) return;
  const float* w = copy.w + row * copy.cols;
  S* out = static_cast<S*>(copy.out) + row * copy.cols;
  const Levels levels(w, copy.cols, copy.clip);
  const float scale = copy.factor * (copy.scale ? copy.scale[row] : 1.0f);
  for_pieces(copy.cols, [&](i64 j, auto size) {
    Piece<size()> p(w + j);
#pragma unroll
    for (float& x : p.x) x = scale * levels.level(x);
    p.store(out + j);
  });
}

struct EndEntry {
  const float *w, *scale;
  float *dw, *dscale;
  i64 rows, cols;
  float factor;
  int clip;
};

// 2 reads, 1 write.
__global__ void __launch_bounds__(kThreads) end_projections(const __grid_constant__ TensorList<EndEntry> projections) {
  const int index = projections.entry_of(blockIdx.x);
  const EndEntry& end = projections.entries[index];
  const i64 row = row_in(blockIdx.x - projections.first[index]);
  if (row >= end.rows) return;
  const float* w = end.w + row * end.cols;
  float* dw = end.dw + row * end.cols;
  const Levels levels(w, end.cols, end.clip);
  const float factor = end.factor * end.scale[row];
  float sum = 0;
  for_pieces(end.cols, [&](i64 j, auto size) {
    const Piece<size()> weight(w + j);
    Piece<size()> gradient(dw + j);
#pragma unroll
    for (int i = 0; i < size(); ++i) {
      sum += levels.level(weight.x[i]) * gradient.x[i];
      gradient.x[i] *= factor;
    }
    gradient.store(dw + j);
  });
  sum = warp_sum(sum);
  if (lane() == 0) end.dscale[row] += end.factor * sum;
}

// |x| as an integer: magnitudes order like their bit patterns, and NaN above infinity.
__device__ __forceinline__ unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// A row with NaN or infinity, or whose scale is beyond fp16, gets an infinite scale and zeros.
__global__ void __launch_bounds__(kThreads)
    quantize(const float* w, i64 rows, i64 cols, int limit, std::int8_t* q, half* scale) {
  constexpr unsigned kInfinity = 0x7f800000;
  constexpr float kHalfSmallestNormal = 0x1p-14f;
  const i64 row = row_in(blockIdx.x);
  if (row >= rows) return;
  w += row * cols;
  q += row * cols;
  unsigned top = 0;
  for_pieces(cols, [&](i64 j, auto size) {
    const Piece<size()> p(w + j);
#pragma unroll
    for (float x : p.x) top = max(top, magnitude_bits(x));
  });
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, offset));
  const float clip = static_cast<float>(limit);
  const float exact = fmaxf(__fdiv_rn(__uint_as_float(top), clip), kHalfSmallestNormal);
  const half rounded = top < kInfinity ? __float2half_rn(exact) : __ushort_as_half(0x7c00);
  const float sigma = __half2float(rounded);
  const bool finite = !isinf(sigma);
  if (lane() == 0) scale[row] = rounded;
  for_pieces(cols, [&](i64 j, auto size) {
    const Piece<size()> p(w + j);
    alignas(8) std::int8_t numbers[size()];
#pragma unroll
    for (int i = 0; i < size(); ++i)
      numbers[i] = static_cast<std::int8_t>(finite ? static_cast<int>(quantum(p.x[i], sigma, clip)) : 0);
    if constexpr (size() == kVector)
      *reinterpret_cast<uint2*>(q + j) = *reinterpret_cast<const uint2*>(numbers);
    else
      q[j] = numbers[0];
  });
}

__global__ void __launch_bounds__(kThreads)
    dequantize(const std::int8_t* q, const half* scale, i64 rows, i64 cols, float* w) {
  const i64 row = row_in(blockIdx.x);
  if (row >= rows) return;
  const float sigma = __half2float(scale[row]);
  q += row * cols;
  w += row * cols;
  for_pieces(cols, [&](i64 j, auto size) {
    alignas(8) std::int8_t numbers[size()];
    if constexpr (size() == kVector)
      *reinterpret_cast<uint2*>(numbers) = *reinterpret_cast<const uint2*>(q + j);
    else
      numbers[0] = q[j];
    Piece<size()> p;
#pragma unroll
    for (int i = 0; i < size(); ++i) p.x[i] = static_cast<float>(numbers[i]) * sigma;
    p.store(w + j);
  });
}

}  // namespace

void CudaBackend::working_copies(std::span<const WorkingCopy> copies) {
  multi_tensor_apply(
      copies,
      [](const WorkingCopy& c) {
        return CopyEntry{c.w.as<float>(), c.scale ? c.scale.as<float>() : nullptr,
                         c.out.data,      c.w.shape[0],
                         c.w.shape[1],    static_cast<float>(c.factor),
                         c.clip};
      },
      [](const CopyEntry& e) { return e.cols == 0 ? 0 : (e.rows + kRows - 1) / kRows; },
      [&](const TensorList<CopyEntry>& batch) {
        with_storage(storage_, [&](auto storage) {
          make_working_copies<decltype(storage)><<<batch.blocks, kThreads, 0, stream()>>>(batch);
          PGOLF_LAUNCHED("make_working_copies");
        });
      });
}

void CudaBackend::finish_projections(std::span<const ProjectionEnd> projections) {
  multi_tensor_apply(
      projections,
      [](const ProjectionEnd& p) {
        return EndEntry{p.w.as<float>(),
                        p.scale.as<float>(),
                        p.dw.as<float>(),
                        p.dscale.as<float>(),
                        p.w.shape[0],
                        p.w.shape[1],
                        static_cast<float>(p.factor),
                        p.clip};
      },
      [](const EndEntry& e) { return e.cols == 0 ? 0 : (e.rows + kRows - 1) / kRows; },
      [&](const TensorList<EndEntry>& batch) {
        end_projections<<<batch.blocks, kThreads, 0, stream()>>>(batch);
        PGOLF_LAUNCHED("end_projections");
      });
}

void CudaBackend::quantize_rows(const TensorView& w, int clip, const TensorView& q, const TensorView& scale) {
  if (w.shape[0] == 0) return;
  quantize<<<blocks_for(w.shape[0], kRows), kThreads, 0, stream()>>>(w.as<float>(), w.shape[0], w.shape[1], clip,
                                                                     q.as<std::int8_t>(), scale.as<half>());
  PGOLF_LAUNCHED("quantize");
}

void CudaBackend::dequantize_rows(const TensorView& q, const TensorView& scale, const TensorView& w) {
  if (w.size() == 0) return;
  dequantize<<<blocks_for(w.shape[0], kRows), kThreads, 0, stream()>>>(q.as<std::int8_t>(), scale.as<half>(),
                                                                       w.shape[0], w.shape[1], w.as<float>());
  PGOLF_LAUNCHED("dequantize");
}

}  // namespace pgolf::cuda
