// The pieces of which a backend composes its sublayers (sublayers.h), to be called one by one: tests compare each with
// the reference, benchmarks time it. The conventions are those of backend.h; a piece has its `saved` and `scratch` as
// embedding and head do there. They are cut where fusion pays. The model knows none of them.
#pragma once

#include "backend.h"

namespace pgolf {

// A block's input as its two readers see it: m = mix[0]⊙(x + skip_weight⊙skip) + mix[1]⊙x0   §2.3–2.4
// It is recomputed where it is read instead of being stored. skip may be x itself.
struct MixedInput {
  TensorView x, x0;        // [B, T, d]
  TensorView resid_mix;    // [2, d]
  TensorView skip;         // [B, T, d]; absent in encoder blocks
  TensorView skip_weight;  // [d]
};

// n = norm_scale·rms(m); q = rope(rms(n·wqᵀ)), k = rope(rms(n·wkᵀ)) per head, v = n·wvᵀ                   §2.5
//   rope turns the pair (j, j + R/2), R = rope_dims or D where that is 0: (a, b) → (a·cos + b·sin, −a·sin + b·cos); the
//   tables' columns from R/2 on are 1 and 0. The query gain is the attention's.
//   Forward alone may make queries of the last T' ≤ T positions only: the block computes what comes after them alone.
struct Qkv {
  MixedInput in;
  double norm_scale = 1.0;
  TensorView wq, wk, wv;  // [H·D, d], [K·D, d], [K·D, d]
  TensorView cos, sin;    // [≥ T, D/2]
  std::int64_t rope_dims = 0;
  TensorView q, k, v;     // out [B, T', H, D], [B, T, K, D], [B, T, K, D]
  TensorView adapters;    // [B, r·(2d + H·D + K·D)]: of q and of v; may be absent, and needs T' = T
  std::int64_t rank = 0;  // r
  TensorView saved, scratch;
};
struct QkvGrads {
  TensorView dqkv;     // in [B, T, H + 2K, D]: the gradients at the products n·wᵀ, those of q, k, v side by side
  TensorView dx;       // inout [B, T, d]: in, the gradient at m from the residual path; out, at x. Where it is absent
                       //   only weights and adapters have gradients: resid_mix, skip_weight, dx0, dskip have none
  TensorView dx0;      // inout [B, T, d], M: +=; may be absent
  TensorView dskip;    // out [B, T, d]: the gradient at skip, when there is one
  TensorView pending;  // in [B, T, d], S or M: added to dx at the end (what later blocks sent back through a skip);
                       //   may be dskip or dx0 itself, which are written first
  TensorView resid_mix, skip_weight, wq, wk, wv;  // both vectors or neither, all three matrices or none
  TensorView adapters;                            // out, M
  TensorView scratch;
};

// o = softmax(gain[h]·q·kᵀ/√D over keys ≤ t)·v, query head h reading key/value head ⌊h·K/H⌋        §2.5
//   q and o hold the last T' positions; the backward needs T' = T. Forward alone may find k and v grown by a few
//   positions each time: areas made for the most are large enough for fewer.
struct Attention {
  TensorView q, k, v;   // [B, T', H, D], [B, T, K, D], [B, T, K, D]
  TensorView gain;      // [H]
  bool normed = false;  // heads of q and k have a mean square of 1 at most, as Qkv's: scores are within ±|gain|·√D
  TensorView o;         // out [B, T', H, D]
  TensorView saved, scratch;
};
// A Qkv's RoPE and what it saved, for a backward that goes from its q and k on to their products.
struct HeadNorms {
  TensorView cos, sin, saved;
  std::int64_t rope_dims = 0;
};
struct AttentionGrads {
  TensorView d_o;   // in [B, T, H, D]
  TensorView dqkv;  // out [B, T, H + 2K, D]: the gradients of q, k, v side by side; at the products that Qkv made them
                    //   of where norms are given
  HeadNorms norms;  // may be absent
  TensorView gain;
  TensorView scratch;
};

// f(u) = scale·u² for u > 0, else scale·(negative_slope·u)². Its value tells its slope but for the sign:
// f'(u) = 2·√(scale·f) for u > 0, else −2·negative_slope·√(scale·f).
struct SquaredRelu {
  double scale = 1.0;  // a power of two below 1 keeps squares within fp16; the projection's working copy undoes it
  double negative_slope = 0.0;
  // With a slope, and where a backward follows: bit i % 8 of byte i / 8 is set where the i-th number of u [B, T, F] is
  // below 0. MlpUp writes it, ProjectResidualGrads reads it.
  TensorView negative;  // [⌈B·T·F/8⌉], u8
};
inline std::int64_t sign_bytes(std::int64_t numbers) { return (numbers + 7) / 8; }

// out = residual + a·wᵀ; the residual is `mixed` if present, else `x`. The scale of the projection (attn_scale,
// mlp_scale) is part of w, whose working copy is scale⊙w.
struct ProjectResidual {
  TensorView a;      // [B, T', c]
  TensorView w;      // [d, c]
  MixedInput mixed;  // attention out: the block's mixed input, of whose T positions the last T' are read
  TensorView x;      // MLP out: [B, T', d]
  TensorView out;    // out [B, T', d]; may be x
  TensorView saved, scratch;
};
struct ProjectResidualGrads {
  TensorView dout;  // in [B, T, d]; it is at once the gradient at the residual, which needs no copy
  // Where a is MlpUp's h, its slope belongs to the product that makes its gradient: with activation.scale > 0, da is
  // the gradient at u, (dout·w)⊙f'(u), rounded once; with 0 that at a.
  SquaredRelu activation{0.0, 0.0, {}};
  TensorView da;  // out [B, T, c]
  TensorView w;   // [d, c] += doutᵀ·a, NOT yet times scale: finish_projections ends it, once a step
  TensorView scratch;
};

// h = f(u), u = norm_scale·rms(x)·wᵀ                                                               §2.6
struct MlpUp {
  double norm_scale = 1.0;
  TensorView x;  // [B, T, d]
  TensorView w;  // [F, d]
  TensorView h;  // out [B, T, F]
  SquaredRelu activation;
  // Where S is f16, h beyond its largest number becomes that number and is counted here, in the backend's memory.
  std::int64_t* saturated = nullptr;
  TensorView saved, scratch;
};
struct MlpUpGrads {
  TensorView du;  // in [B, T, F]: the gradient at u, as ProjectResidualGrads leaves it
  TensorView dx;  // inout [B, T, d]: +=
  TensorView w;
  TensorView scratch;
};

class Pieces {
 public:
  virtual ~Pieces() = default;

#define PGOLF_METHOD(result, name, parameters, arguments) virtual result name parameters = 0;
#include "piece_methods.def"
#undef PGOLF_METHOD
};

}  // namespace pgolf
