// The one seam between the model and the machine.
//
// Every operation that the model, the optimizer and the averaging need is a method here. The model's are the embedding,
// the two sublayers of a block and the head. An operation is a struct of TensorViews: inputs, parameters, outputs, and
// memory of the backend's own. Embedding and head have two raw areas of it,
//   saved    what this backend wants to keep from forward to backward (its size and content are the backend's),
//   scratch  memory whose content means nothing before and after the call; the backward's is in the Grads struct,
// whose sizes their `…_bytes` method states, asked once with shapes only (data pointers null). A sublayer asks for
// named buffers (SublayerMemory): what it computes one after another, fuses, keeps or recomputes is the backend's.
//
// Conventions
//   B sequences of T tokens, N = B·T; V vocabulary, d width, H query heads, K key/value heads, D = d/H,
//   F hidden width, n buckets and e width of the bigram table. Row-major; weights are [out, in].
//   Two dtypes. S, the storage dtype (Backend::dtype): activations, their gradients, and the matrices that products
//   read: working copies, made once a step by `working_copies`. M, the master dtype (Backend::master_dtype, f32 or
//   f64): master weights, vectors and scalars of parameters, every parameter gradient, moments, rope tables, logits,
//   losses, dx0. Token ids are i32. Unless a comment says otherwise, matrices and activations are S, all else is M. An
//   operation computes in M and rounds each S tensor it writes once. "out" tensors are written, parameter gradients are
//   added to (+=), "inout" is said. No two tensors of a call overlap unless a comment allows it. Absent tensors have
//   rank 0; a parameter gradient that is absent is not computed. Sums are ordered by shape alone: equal inputs give
//   equal bits for any number of threads. rms(x) = x·(mean(x²) + ε)^(−1/2) over the last axis, ε = 2⁻²³.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "core/tensor.h"

namespace pgolf {

inline constexpr double kRmsEpsilon = 0x1p-23;

struct OpBytes {
  std::size_t saved = 0;
  std::size_t forward_scratch = 0;
  std::size_t backward_scratch = 0;
};

// x0 = smear(rms(tok_emb[ids] + scale·proj·bigram_emb[hash]))            docs/spec.md §2.1–2.2
//   hash[0] = n−1; hash[t] = ((36313·ids[t]) xor (27191·ids[t−1])) mod (n−1), wrapping i32, remainder ≥ 0
//   smear: y[t] = (1−g)·x[t] + g·x[t−1], g = sigmoid(gate), x[−1] = 0; with reset_at_bos also 0 before a BOS
struct Embed {
  TensorView ids;           // [B, T] i32
  TensorView tok_emb;       // [V, d]
  TensorView bigram_emb;    // [n, e]; absent: no bigram term
  TensorView bigram_proj;   // [d, e]; absent where e = d: the identity
  TensorView bigram_scale;  // [1]
  TensorView smear_gate;    // [d]
  bool reset_at_bos = false;
  std::int32_t bos_id = 1;
  TensorView x0;  // out [B, T, d]
  TensorView saved, scratch;
};
struct EmbedGrads {
  TensorView dx0;  // in [B, T, d], S: what the first block's dx became
  TensorView tok_emb, bigram_emb, bigram_proj, bigram_scale, smear_gate;
  TensorView scratch;
};

// Adapters, for test-time training: each sequence b of a call may have low-rank changes of its own of a product     §5
// n·wᵀ:
//   y[b] = n[b]·wᵀ + u[b]·bᵀ, u[b] = n[b]·aᵀ, with a [r, in] and b [out, r].
// One tensor holds them for an operation: row b has the a's of its products one after another, then their b's. u is S.

// What flows through the network from sublayer to sublayer.
struct Stream {
  TensorView x;  // [B, T, d]
};

// The memory that a sublayer asks for beside its streams: buffers, which the arena places. The forward has `steps`
// steps, 0 … steps − 1, and the backward as many, steps … 2·steps − 1, in the opposite order. A buffer is alive, and
// keeps what is in it, from step `first` to step `last`. The streams that a sublayer reads are alive during all its
// steps, the one that it writes from the last step of the forward on, and dskip from the last one of the backward on.
struct SublayerMemory {
  static constexpr int kMost = 16;
  struct Buffer {
    const char* name = "";  // of its kind, for people: "q", "mlp hidden"; lives as long as the backend
    std::size_t bytes = 0;  // 0: it is not placed, and its pointer is null
    int first = 0, last = 0;
  };
  int steps = 0;
  int count = 0;
  Buffer buffers[kMost];
};

// out = m + (attention over n)·woᵀ                                                                 §2.3–2.5
//   m = resid_mix[0]⊙(x + skip_weight⊙skip) + resid_mix[1]⊙x0, the block's mixed input; n = norm_scale·rms(m)
//   q = rope(rms(n·wqᵀ)), k = rope(rms(n·wkᵀ)) per head, v = n·wvᵀ;
//   attention: softmax(gain[h]·q·kᵀ/√D over keys ≤ t)·v, query head h reading key/value head ⌊h·K/H⌋
//   rope turns a head's first R numbers, R = rope_dims or D where that is 0, the pair (j, j + R/2) by
//   (a, b) → (a·cos + b·sin, −a·sin + b·cos); of the tables, columns from R/2 on are 1 and 0
// Forward alone may compute the last T' ≤ T positions of out only.
struct AttentionSublayer {
  Stream x, x0;
  Stream skip;             // absent where nothing is popped; may be x itself
  TensorView resid_mix;    // [2, d]
  TensorView skip_weight;  // [d], with skip
  double norm_scale = 1.0;
  TensorView wq, wk, wv;  // [H·D, d], [K·D, d], [K·D, d]
  TensorView gain;        // [H]
  TensorView wo;          // [d, H·D]; its scale (attn_scale) is part of its working copy
  // Row p is for position p of a text; the T positions of this call begin at `position`.
  TensorView cos, sin;         // [≥ position + T, D/2]
  std::int64_t rope_dims = 0;  // even
  std::int64_t position = 0;
  // Keys and values of a text that grows, past norm and RoPE, kept by the caller: those of positions before `position`
  // are read, those of this call's positions written. Absent: there are no positions before, and nobody keeps them.
  TensorView k, v;        // [1, ≥ position + T, K, D]
  TensorView adapters;    // [B, r·(2d + H·D + K·D)]: of q and of v; may be absent, and needs T' = T
  std::int64_t rank = 0;  // r
  Stream out;             // [B, T', d]
  void* memory[SublayerMemory::kMost] = {};
};
struct AttentionSublayerGrads {
  TensorView dx;       // inout [B, T, d]: in, the gradient at out; out, at x
  bool inputs = true;  // false: only weights and adapters have gradients: resid_mix, skip_weight, dx0, dskip and x have
                       //   none, and dx is only read
  TensorView dx0;      // inout [B, T, d], M: +=; may be absent
  TensorView dskip;    // out [B, T, d]: the gradient at skip, when there is one
  TensorView pending;  // in [B, T, d], S or M: added to dx at the end (what later blocks sent back through a skip);
                       //   may be dskip or dx0 itself, which are written first
  TensorView resid_mix, skip_weight, wq, wk, wv;  // both vectors or neither, all three matrices or none
  TensorView gain;
  TensorView wo;        // += (gradient at out)ᵀ·o, NOT yet times scale: finish_projections ends it, once a step
  TensorView adapters;  // out, M
};

// out = x + f(norm_scale·rms(x)·upᵀ)·downᵀ; f(u) = u² for u > 0, else (negative_slope·u)²                       §2.6
struct MlpSublayer {
  Stream x;
  double norm_scale = 1.0;
  double negative_slope = 0.0;  // ≥ 0; 0 is ReLU²
  TensorView up;                // [F, d]
  TensorView down;              // [d, F]; its scale (mlp_scale) and mlp_down_factor are part of its working copy
  // Where S is f16, a hidden value beyond its largest number becomes that number and is counted here, in the backend's
  // memory.
  std::int64_t* saturated = nullptr;
  Stream out;
  void* memory[SublayerMemory::kMost] = {};
};
struct MlpSublayerGrads {
  TensorView dx;        // inout [B, T, d]: in, the gradient at out; out, at x
  TensorView up, down;  // down's as AttentionSublayerGrads::wo
};

// logits = c·tanh(rms(x)·wᵀ/c); loss[t] = logsumexp(logits[t]) − logits[t][target]                    §2.7
// Only positions first … T−1 of each sequence are computed; T' = T − first.
struct Head {
  TensorView x;        // [B, T, d]
  TensorView w;        // [V, d]
  TensorView targets;  // [B, T] i32; not read by head_logits
  double softcap = 30.0;
  std::int64_t first = 0;
  TensorView adapters;  // [B, r·(d + V)]: of rms(x)·wᵀ; may be absent
  std::int64_t rank = 0;
  TensorView logits;  // out [B, T', V], head_logits only
  TensorView losses;  // out [B, T'], in nats
  TensorView saved, scratch;
};
struct HeadGrads {
  double loss_scale = 1.0;             // the gradient is that of loss_scale·Σ losses …
  const double* multiplier = nullptr;  // … times this number in the backend's memory, where it is given
  TensorView weights;                  // [B, T']: the factor of each loss in the sum; absent: 1
  TensorView dx;                       // out [B, T, d]; 0 before first
  TensorView w;
  TensorView adapters;  // out, M
  TensorView scratch;
};

// Everything that changes from step to step lies in the backend's memory, so that a captured step can be replayed.
enum Group : int { kMatrix, kEmbedding, kScalar, kHead, kGroups };
struct StepSettings {  // what the schedule decides for one step; the host writes it
  double lr[kGroups];
  double weight_decay[kGroups];
  double beta1, beta2, eps;
  double momentum;
  double clip;  // limit of the global gradient norm; 0: off
};
struct StepValues : StepSettings {
  // Written by grad_norm:
  double grad_norm;     // of the unscaled gradients
  double grad_scale;    // what gradients are multiplied by: min(1, clip/(norm + 1e−6)), over the loss scale
  double bias1, bias2;  // 1 − β₁ᵗ and 1 − β₂ᵗ
  std::int32_t finite;  // 0: no optimizer operation changes anything
  // State that lives from step to step:
  std::int32_t stopped;     // a step was not finite and losses are not scaled: no later step changes anything either
  std::int32_t scaling;     // fp16: the loss scale adapts, and a step that overflows is skipped
  std::int32_t clean;       // steps since the loss scale last changed; below 0: overflows in a row at its least
  double loss_scale;        // what gradients were multiplied by; 1 unless `scaling`
  std::int64_t adam_steps;  // t: steps that changed weights
  double loss_sum;          // Σ losses of the step's micro-batches
  std::int64_t saturated;   // hidden values of the step that fp16 could not hold
};

// out = round(factor·scale⊙Q(w)): what products read in place of w. Q is the identity, or for clip > 0 late QAT's
// clamp(round_half_even(w/σ), −c−1, c)·σ with σ = max(max|row|/c, 1e−12) in float32.               §3
struct WorkingCopy {
  TensorView w;      // [rows, cols], M
  TensorView scale;  // [rows], M, or absent
  int clip;
  double factor;   // a power of two
  TensorView out;  // [rows, cols], S
};
// dscale[i] += factor·Q(w)[i]·dw[i]; dw[i] *= factor·scale[i]: ends the gradients of a projection, gathered over a
// step. The gradient of scale needs no product a·wᵀ this way: Σₜ dout[t,i]·(a·wᵀ)[t,i] = w[i]·(doutᵀ·a)[i].
struct ProjectionEnd {
  TensorView w, scale;  // [rows, cols], [rows]: master weights
  int clip;
  double factor;
  TensorView dw, dscale;  // inout
};

// X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, `steps` times. Step i takes the i-th of `count` polynomials, a later one the
// last.                                                                                              §3
struct NewtonSchulzSteps {
  static constexpr int kMost = 8;
  struct Polynomial {
    double a, b, c;
  };
  int steps = 5;
  int count = 1;
  Polynomial polynomials[kMost] = {{3.4445, -4.7750, 2.0315}};  // Keller Jordan's
  PGOLF_INLINE const Polynomial& of(int step) const { return polynomials[step < count ? step : count - 1]; }
};
struct MuonRule {
  NewtonSchulzSteps steps;
  bool normalize_rows = false;  // of the update, before the steps: each over max(its L2 norm, 1e−7)
};

struct AdamTensor {
  TensorView w, grad, m, v;  // w, m, v inout
  Group group;
};
struct MuonTensor {
  TensorView w, grad, momentum;  // [rows, cols]; w, momentum inout
};

// The adapters of an operation for a batch of documents, row b document b's.                         §5
struct AdapterRows {
  TensorView w, grad, m, v;  // [B, size]; grad is read, the others inout
  TensorView copy;           // [B, size], S: w rounded, which operations read; absent where nothing is rounded
  int products;              // 1 or 2: how many a's a row begins with
  std::int64_t a_size;       // r·in
  double bound;              // 1/√in
  std::uint32_t streams[2];  // CRC-32 of the a's names
};
struct AdapterAdam {
  double lr, beta1, beta2, eps;
  double grad_scale;  // what gradients are multiplied by
};

// See pieces.h.
class Pieces;

class Backend {
 public:
  virtual ~Backend() = default;

#define PGOLF_METHOD(result, name, parameters, arguments) virtual result name parameters = 0;
#include "backend_methods.def"
#include "sublayer_methods.def"
#undef PGOLF_METHOD

  bool rounds() const { return precision() != master_dtype(); }

  static constexpr int kReads = 8;  // of read_later
  static constexpr std::size_t kReadBytes = std::size_t{1} << 20;

  // recording 0: runs fn, records it as well and returns the recording (0 where this backend records nothing);
  // otherwise replays the recording, which does what fn did: all that changes between calls must lie in the backend's
  // memory. fn gives the backend operations, zero, copy, and nothing that waits. Pass std::cref of a lambda: a function
  // object of its size would be allocated.
  virtual int capture(int recording, const std::function<void()>& fn) = 0;

  virtual Pieces& pieces() = 0;  // the same backend
};

// The CPU backend for M = f32 or f64, S = M; picks the widest instruction set of this machine, or PGOLF_CPU_ISA.
// With `rounding` bf16 or f16 (and M = f32), S tensors are floats that hold numbers of that dtype: what a GPU computes,
// up to the order of sums.
std::unique_ptr<Backend> make_cpu_backend(DType master, DType rounding);
std::string cpu_isa();  // "avx512", "avx2" or "plain": what make_cpu_backend uses

}  // namespace pgolf
