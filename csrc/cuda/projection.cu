// Projections back into the residual stream. Their scale is part of w, so that all is plain products onto the residual.
//
// Rounded to S. Forward onto x: out. Forward onto the mixed input: first the product a·wᵀ, which is small against the
// residual, then out. Backward: da.
#include "cuda/linear.h"
#include "cuda/rows.cuh"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 N, d, c;
  explicit Dims(const ProjectResidual& op) : N(op.out.shape[0] * op.out.shape[1]), d(op.w.shape[0]), c(op.w.shape[1]) {}
  Linear linear(DType S) const { return {S, N, c, d}; }
};

constexpr int kThreads = 256;

// out += the mixed input. Memory-bound: 3 or 4 reads, 1 write.
template <class S>
__global__ void __launch_bounds__(kThreads) add_mixed(Mixed<S> in, i64 count, int d, S* out) {
  const i64 at = (i64{blockIdx.x} * kThreads + threadIdx.x) * kVector;
  if (at >= count) return;
  const int column =
      static_cast<int>(static_cast<unsigned>(at / kVector) % static_cast<unsigned>(d / kVector)) * kVector;
  const Vector8 x0 = load8(in.x0 + at);
  Vector8 sum = load8<S>(out + at), m = load8(in.x + at);
  if (in.skip) m = in.skipped(m, load8(in.skip + at), column);
  m = in.mix(m, x0, column);
#pragma unroll
  for (int j = 0; j < kVector; ++j) sum.x[j] += m.x[j];
  store8(out + at, sum);
}

}  // namespace

OpBytes CudaBackend::bytes(const ProjectResidual&) const { return {}; }

void CudaBackend::project_residual_forward(const ProjectResidual& op) {
  const Dims s(op);
  Gemm product = s.linear(storage_).forward(op.a.data, op.w.data, op.out.data, storage_);
  if (!op.mixed.x) {
    product.c = op.x.data;
    product.beta = 1.0f;
    return gemm(product);
  }
  require(s.d % kVector == 0, "A row has ", s.d, " numbers; the CUDA backend needs a multiple of ", kVector, ".");
  gemm(product);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    add_mixed<S><<<blocks_for(s.N * s.d, kThreads * kVector), kThreads, 0, stream()>>>(
        Mixed<S>(op.mixed), s.N * s.d, static_cast<int>(s.d), op.out.as<S>());
    PGOLF_LAUNCHED("add_mixed");
  });
}

void CudaBackend::project_residual_backward(const ProjectResidual& op, const ProjectResidualGrads& grads) {
  const Dims s(op);
  gemm(s.linear(storage_).backward(grads.dout.data, op.w.data, grads.da.data));
  gemm(s.linear(storage_).weights(grads.dout.data, op.a.data, grads.w.data));
}

}  // namespace pgolf::cuda
