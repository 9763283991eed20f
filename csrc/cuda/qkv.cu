// Mixed input, norm, the three projections in one GEMM, norm and RoPE of q and k.
//
// Rounded to S. Forward: normed = rms(m); the GEMM normed·wᵀ of each of q, k, v; q and k after norm and rotation.
// Backward: dnormed, the sum over q, k, v of their gradients times the weights; normed, recomputed for the weights'
// gradients; dskip; dx. The gradient at m and the norm's backward are not rounded, dx0 takes float32, and a pending
// dskip is added as rounded. By itself, the heads' norm and RoPE backward rounds once more. With adapters: u, du; u·b
// is added in float32, and so is du·a, to dnormed as rounded, after which that is rounded once more where the sum is a
// GEMM's.
#include "cuda/adapters.h"
#include "cuda/gemm_args.h"
#include "cuda/qk_norm_rope.cuh"
#include "cuda/residual_mix.cuh"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 N, T, d, H, K, D;
  i64 width;    // of q, k and v side by side
  i64 queries;  // of a sequence: the last of its T positions
  i64 rank;     // of adapters; 0: none
  RopeOrder order;
  explicit Dims(const Qkv& op)
      : N(op.k.shape[0] * op.k.shape[1]),
        T(op.k.shape[1]),
        d(op.in.x.shape[2]),
        H(op.q.shape[2]),
        K(op.k.shape[2]),
        D(op.q.shape[3]),
        width((H + 2 * K) * D),
        queries(op.q.shape[1]),
        rank(op.adapters ? op.rank : 0),
        order(op.rope_dims, D) {}
  i64 query_rows() const { return N / T * queries; }
  Linear linear(DType S) const { return {S, N, d, width}; }
  Adapters<2> adapters(DType S) const { return {S, N / T, T, rank, d, {H * D, K * D}}; }
};

struct Saved : HeadFactors {
  void* u;  // [N, 2·rank]
  Saved(Layout& layout, DType S, const Dims& s)
      : HeadFactors(layout, s.N, s.query_rows() * s.H, s.N * s.K), u(layout.take(S, s.N * 2 * s.rank)) {}
};

// Whether norm and RoPE of q and k are in the GEMM's epilogue.
bool fuses(const CudaBackend& backend, const Dims& s) {
  using Tiles = sm90::GemmTiles;
  const bool whole_heads = s.H * s.D % Tiles::kColumns == 0 && s.K * s.D % Tiles::kColumns == 0;
  const bool whole_ranks = s.rank % kVector == 0 && (s.rank == 0 || s.T % 16 == 0);  // Delta::add_to_rows
  return whole_ranks && whole_heads && (s.D == 64 || s.D == 128) && sm90::gemm_fits(backend, s.N, s.width, s.d);
}

// Whether residual_mix_backward adds du·a of adapters (Added), a warp a row.
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
  void *dnormed, *weights;  // dnormed becomes normed, row by row
  void* du;                 // [N, 2·rank]
  float* columns;           // [column_blocks, 3, d] partial gradients of both mixes and the skip weight
  BackwardScratch(Layout& layout, DType S, const Dims& s)
      : dnormed(layout.take(S, s.N * s.d)),
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

// normed = rms(m) of `rows` tokens, of each sequence those from position `first` on.
template <class S>
void norm_input(cudaStream_t stream, const Qkv& op, const Dims& s, i64 rows, i64 first, void* normed, float* factors) {
  with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
    norm_residual_mix<S, vectors><<<row_blocks(rows, warps), kRowThreads, 0, stream>>>(
        Mixed<S>(op.in), Positions{0, static_cast<unsigned>(s.T), static_cast<unsigned>(first)}, rows,
        static_cast<int>(s.d), warps, static_cast<float>(op.norm_scale), static_cast<S*>(normed), factors);
    PGOLF_LAUNCHED("norm_residual_mix");
  });
}

}  // namespace

OpBytes CudaBackend::qkv_bytes(const Qkv& op) const {
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
    // Heads from the GEMM of normed with the rows of the packed weights from `weight_row` on.
    const auto project = [&](const ProductPart& part, i64 weight_row) {
      const void* w = weights + static_cast<std::size_t>(weight_row * s.d) * sizeof(S);
      const i64 width = (part.H + 2 * part.K) * s.D;
      const Delta<S> delta{static_cast<const S*>(saved.u), op.adapters.as<S>() + adapters.b_at(0), adapters.size(),
                           adapters.b_at(1) - adapters.b_at(0), static_cast<int>(s.rank)};
      if (s.rank) gemm(adapters.down(scratch.normed, op.adapters.data, saved.u));
      if constexpr (sizeof(S) == 2) {
        const auto fused = [&](auto head_width, auto adapted) {
          sm90::launch_weight_stationary_gemm<S>(
              *this, "qkv", scratch.normed, w, part.rows, width, s.d,
              QkNormRope<S, head_width(), adapted()>{part.rows, int(part.T), int(part.first), int(part.H), int(part.K),
                                                     op.cos.as<float>(), op.sin.as<float>(), op.q.as<S>(), op.k.as<S>(),
                                                     op.v.as<S>(), saved.q, saved.k, delta, s.order});
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
          const Heads heads(part, s.D, unit, s.order);
          qk_norm_rope<S, unit, adapted><<<heads.blocks(heads.H + 2 * heads.K), kRowThreads, 0, stream()>>>(
              heads, static_cast<const S*>(scratch.packed), delta, op.cos.as<float>(), op.sin.as<float>(), op.q.as<S>(),
              op.k.as<S>(), op.v.as<S>(), saved.q, saved.k);
          PGOLF_LAUNCHED("qk_norm_rope");
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

void CudaBackend::heads_backward(const Qkv& op, const TensorView& dqkv) {
  const Dims s(op);
  Layout layout(op.saved.data);
  const Saved saved(layout, storage_, s);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    with_unit(s.D, [&](auto unit) {
      const Heads heads({s.N, s.T, 0, s.H, s.K}, s.D, unit, s.order);
      qk_norm_rope_backward<S, unit><<<heads.blocks(heads.H + heads.K), kRowThreads, 0, stream()>>>(
          heads, op.q.as<S>(), op.k.as<S>(),
          QkNormRopeArgs{op.cos.as<float>(), op.sin.as<float>(), saved.q, saved.k, s.order}, dqkv.as<S>());
      PGOLF_LAUNCHED("qk_norm_rope_backward");
    });
  });
}

void CudaBackend::qkv_backward(const Qkv& op, const QkvGrads& grads) {
  const Dims s(op);
  Layout saved_layout(op.saved.data), scratch_layout(grads.scratch.data);
  const Saved saved(saved_layout, storage_, s);
  const BackwardScratch scratch(scratch_layout, storage_, s);
  const Adapters<2> adapters = s.adapters(storage_);
  const auto columns = [&](i64 from) {
    return grads.dqkv.as<char>() + static_cast<std::size_t>(from * s.D) * size_of(storage_);
  };
  const char* const dq = columns(0);
  const char* const dk = columns(s.H);
  const char* const dv = columns(s.H + s.K);
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    if (s.rank) {
      gemm(adapters.up_backward(0, dq, s.width, op.adapters.data, scratch.du));
      gemm(adapters.up_backward(1, dv, s.width, op.adapters.data, scratch.du));
    }
    if (!grads.dx) return norm_input<S>(stream(), op, s, s.N, 0, scratch.dnormed, nullptr);
    gemm(s.linear(storage_).backward(dq, packed_weights(stream(), op, scratch.weights), scratch.dnormed));
    const bool adds = s.rank && adds_in_rows(*this, s);
    if (s.rank && !adds) gemm(adapters.down_backward(scratch.du, op.adapters.data, scratch.dnormed));
    const i64 blocks = column_blocks(s.N);
    const Added<S> added{static_cast<const S*>(scratch.du), op.adapters.as<S>(), adapters.size(),
                         (s.N / kRowWarps + blocks - 1) / blocks * kRowWarps, static_cast<int>(s.T)};
    // The column sums leave a thread room for two or three vectors.
    with_row_team<sizeof(S) == 4 ? 2 : 3>(s.d, [&](auto vectors, int warps) {
      const auto launch = [&](auto skips, auto sums, auto adding) {
        const auto kernel = residual_mix_backward<S, vectors, skips, sums, adding>;
        const int d = static_cast<int>(s.d), shared = d * int(sizeof(float)) + (adding ? Added<S>::bytes(d) : 0);
        if (adding) PGOLF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        kernel<<<static_cast<unsigned>(blocks), kRowThreads, shared, stream()>>>(
            Mixed<S>(op.in), s.N, d, warps, static_cast<float>(op.norm_scale), saved.input,
            static_cast<S*>(scratch.dnormed), input_grads(grads), scratch.columns, added);
        PGOLF_LAUNCHED("residual_mix_backward");
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
    gemm(adapters.b_gradient(0, dq, s.width, saved.u, grads.adapters.data));
    gemm(adapters.b_gradient(1, dv, s.width, saved.u, grads.adapters.data));
  }
  if (!grads.wq) return;

  // The three weight gradients, together where they lie together.
  const auto weight_gradient = [&](const TensorView& w, const char* gradients, i64 rows) {
    Linear part = s.linear(storage_);
    part.out = rows;
    gemm(part.weights(gradients, scratch.dnormed, w.data));
  };
  if (one_after_the_other(grads.wq, grads.wk, grads.wv)) return weight_gradient(grads.wq, dq, s.width);
  weight_gradient(grads.wq, dq, s.H * s.D);
  weight_gradient(grads.wk, dk, s.K * s.D);
  weight_gradient(grads.wv, dv, s.K * s.D);
}

}  // namespace pgolf::cuda
