// Causal attention with grouped queries: which kernels serve a call, what they keep, and the gain's gradient.
#include <cmath>

#include "cuda/attention.cuh"
#include "cuda/attention_last.cuh"
#include "cuda/sm90/attention_backward.cuh"
#include "cuda/sm90/attention_forward.cuh"

namespace pgolf::cuda {
namespace {

// gain[h] += Σ partials[h], one block a head
__global__ void add_gain_gradients(const float* partials, int count, float* gain) {
  __shared__ float shared[kWarp];
  const float* own = partials + static_cast<i64>(blockIdx.x) * count;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += own[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) gain[blockIdx.x] += sum;
}

template <class S>
AttentionArgs<S> arguments(const Attention& op) {
  const auto size = [&](const TensorView& t, int axis) { return static_cast<int>(t.shape[axis]); };
  const int D = size(op.q, 3);
  const float root = 1.0f / std::sqrt(static_cast<float>(D));
  return {.batch = size(op.q, 0),
          .T = size(op.k, 1),
          .H = size(op.q, 2),
          .K = size(op.k, 2),
          .D = D,
          .queries = size(op.q, 1),
          .root = root,
          .normed = op.normed,
          .q = op.q.as<S>(),
          .k = op.k.as<S>(),
          .v = op.v.as<S>(),
          .gain = op.gain.as<float>(),
          .o = op.o.as<S>(),
          .lse = op.saved.as<float>()};
}

// Whether the wgmma kernels take it.
template <class S>
bool has_wgmma_attention(const CudaBackend& backend, const AttentionArgs<S>& a) {
  return sizeof(S) == 2 && backend.has_wgmma() && a.D == sm90::kHeadWidth;
}

struct BackwardScratch {
  int partials;  // of a head's gain
  float *delta, *dgain;
  template <class S>
  BackwardScratch(Layout& layout, const AttentionArgs<S>& a, bool hopper)
      : partials(a.batch * static_cast<int>(blocks_for(
                               a.queries, hopper ? sm90::DqTiles::kGainRows : AttentionKernels<S>::dq_rows(a.D)))),
        delta(layout.take<float>(i64{a.batch} * a.H *
                                 (hopper ? sm90::QueryRows::tiles(a.queries) * sm90::QueryRows::kNumbers : a.queries))),
        dgain(layout.take<float>(static_cast<i64>(a.H) * partials)) {}
};

}  // namespace

OpBytes CudaBackend::attention_bytes(const Attention& op) const {
  const i64 D = op.q.shape[3], sequence = op.k.shape[1] * (op.q.shape[2] + 2 * op.k.shape[2]) * D;
  require_head_width(D);
  require(sequence <= kMostElements, "A sequence of queries, keys and values has ", sequence,
          " numbers; on a GPU it may have ", kMostElements, ": make the sequences shorter.");
  return with_storage(dtype(), [&](auto storage) -> OpBytes {
    const auto a = arguments<decltype(storage)>(op);
    Layout saved, backward;
    saved.take<float>(static_cast<i64>(a.batch) * a.H * a.queries);
    BackwardScratch(backward, a, has_wgmma_attention(*this, a));
    return {saved.used(), 0, backward.used()};
  });
}

void CudaBackend::attention_forward(const Attention& op) {
  with_storage(dtype(), [&](auto storage) {
    using S = decltype(storage);
    const AttentionArgs<S> a = arguments<S>(op);
    if (a.queries == 1 && a.T > 1) return launch_attention_last(a, stream());  // keeps nothing: no backward follows
    if constexpr (sizeof(S) == 2)
      if (has_wgmma_attention(*this, a)) return sm90::launch_attention_forward(*this, a);
    AttentionKernels<S>::forward(a, stream());
  });
}

void CudaBackend::attention_backward(const Attention& op, const AttentionGrads& grads) {
  with_storage(dtype(), [&](auto storage) {
    using S = decltype(storage);
    const AttentionArgs<S> a = arguments<S>(op);
    Layout layout(grads.scratch.data);
    const BackwardScratch scratch(layout, a, has_wgmma_attention(*this, a));
    const i64 N = i64{a.batch} * a.T;
    Layout norms_layout(grads.norms.saved.data);
    const HeadFactors factors(norms_layout, N, N * a.H, N * a.K);
    const QkNormRopeArgs norms{grads.norms.cos.as<float>(), grads.norms.sin.as<float>(), factors.q, factors.k,
                               RopeOrder(grads.norms.rope_dims, a.D)};
    const AttentionGradArgs<S> g{op.o.as<S>(),  grads.d_o.as<S>(), grads.dqkv.as<S>(),
                                 scratch.delta, scratch.dgain,     norms};
    const auto run = [&] {
      if constexpr (sizeof(S) == 2)
        if (has_wgmma_attention(*this, a)) return sm90::launch_attention_backward(*this, a, g);
      AttentionKernels<S>::backward(a, g, stream());
      if (!grads.norms.saved) return;
      Qkv heads;
      heads.q = op.q;
      heads.k = op.k;
      heads.cos = grads.norms.cos;
      heads.sin = grads.norms.sin;
      heads.saved = grads.norms.saved;
      heads.rope_dims = grads.norms.rope_dims;
      heads_backward(heads, grads.dqkv);
    };
    run();
    if (!grads.gain) return;
    constexpr int kThreads = 256;
    launch("add_gain_gradients", add_gain_gradients, a.H, kThreads, 0, stream(), scratch.dgain, scratch.partials,
           grads.gain.as<float>());
  });
}

}  // namespace pgolf::cuda
