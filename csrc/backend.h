// The one seam between the model and the machine.
//
// Every operation that the model, the optimizer and the averaging need is a method here, cut where fusion
// pays. An operation is a struct of TensorViews: inputs, parameters, outputs and two raw areas,
//   saved    what this backend wants to keep from forward to backward (its size and content are the backend's),
//   scratch  memory whose content means nothing before and after the call; the backward's is in the Grads struct.
// All sizes come from the operation's `bytes` overload, asked once with shapes only (data pointers null).
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

// A block's input as its two readers see it: m = mix[0]⊙(x + skip_weight⊙skip) + mix[1]⊙x0   §2.3–2.4
// It is recomputed where it is read instead of being stored. skip may be x itself.
struct MixedInput {
  TensorView x, x0;        // [B, T, d]
  TensorView resid_mix;    // [2, d]
  TensorView skip;         // [B, T, d]; absent in encoder blocks
  TensorView skip_weight;  // [d]
};

// Adapters, for test-time training: each sequence b of a call may have low-rank changes of its own of a product     §5
// n·wᵀ:
//   y[b] = n[b]·wᵀ + u[b]·bᵀ, u[b] = n[b]·aᵀ, with a [r, in] and b [out, r].
// One tensor holds them for an operation: row b has the a's of its products one after another, then their b's. u is S.

// n = rms(m); q = rope(rms(n·wqᵀ)), k = rope(rms(n·wkᵀ)) per head, v = n·wvᵀ                   §2.5
//   rope on the pair (j, j + D/2): (a, b) → (a·cos + b·sin, −a·sin + b·cos). The query gain is the attention's.
//   Forward alone may make queries of the last T' ≤ T positions only: the block computes what comes after them alone.
struct Qkv {
  MixedInput in;
  TensorView wq, wk, wv;  // [H·D, d], [K·D, d], [K·D, d]
  TensorView cos, sin;    // [≥ T, D/2]
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
// A Qkv's tables and what it saved, for a backward that goes from its q and k on to their products.
struct HeadNorms {
  TensorView cos, sin, saved;
};
struct AttentionGrads {
  TensorView d_o;   // in [B, T, H, D]
  TensorView dqkv;  // out [B, T, H + 2K, D]: the gradients of q, k, v side by side; at the products that Qkv made them
                    //   of where norms are given
  HeadNorms norms;  // may be absent
  TensorView gain;
  TensorView scratch;
};

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
  // Where a is MlpUp's h, the slope of ReLU² belongs to the product that makes its gradient: with h_scale > 0, da is
  // the gradient at u of h = h_scale·relu(u)², which is (dout·w)⊙2·√(h_scale·h), rounded once; with 0 that at a.
  double h_scale = 0;
  TensorView da;  // out [B, T, c]
  TensorView w;   // [d, c] += doutᵀ·a, NOT yet times scale: finish_projections ends it, once a step
  TensorView scratch;
};

// h = h_scale·relu(u)², u = rms(x)·wᵀ                                                              §2.6
struct MlpUp {
  TensorView x;          // [B, T, d]
  TensorView w;          // [F, d]
  TensorView h;          // out [B, T, F]
  double h_scale = 1.0;  // a power of two below 1 keeps squares within fp16; the projection's working copy undoes it
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

class Backend {
 public:
  virtual ~Backend() = default;

  virtual DType dtype() const = 0;         // S
  virtual DType master_dtype() const = 0;  // M
  // The dtype whose numbers S tensors hold: S, or a narrower one that this backend rounds them to.
  virtual DType precision() const = 0;
  bool rounds() const { return precision() != master_dtype(); }
  virtual std::string description() const = 0;  // "cpu avx512, float32, 2 threads"
  // Scratch sizes depend on this number; a plan made under another one must be made again.
  virtual int concurrency() const = 0;

  // Memory. Host pointers on one side, the backend's on the other. A backend runs what it is given in order, but may
  // still be at it when a call returns; only download, wait and synchronize wait for results.
  virtual void* allocate(std::size_t bytes) = 0;  // throws DeviceError
  virtual void release(void* pointer) noexcept = 0;
  virtual std::size_t memory_limit() const = 0;  // bytes that it may take in all; 0: no limit is known
  virtual std::size_t peak_memory() const = 0;   // the most bytes it has had allocated at once; 0: it does not count
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;  // from may change after the call
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  virtual void zero(const TensorView& t) = 0;
  virtual void copy(const TensorView& to, const TensorView& from) = 0;
  virtual void synchronize() = 0;

  // Reads now, in the order of operations, what `wait` hands out later: the host can run ahead. At most kReads reads
  // of at most kReadBytes are under way; tickets are waited for once, in any order.
  static constexpr int kReads = 8;
  static constexpr std::size_t kReadBytes = std::size_t{1} << 20;
  virtual int read_later(const void* from, std::size_t bytes) = 0;  // returns a ticket
  virtual void wait(int ticket, void* to, std::size_t bytes) = 0;

  // recording 0: runs fn, records it as well and returns the recording (0 where this backend records nothing);
  // otherwise replays the recording, which does what fn did: all that changes between calls must lie in the backend's
  // memory. fn gives the backend operations, zero, copy, and nothing that waits. Pass std::cref of a lambda: a function
  // object of its size would be allocated.
  virtual int capture(int recording, const std::function<void()>& fn) = 0;
  virtual void forget(int recording) noexcept = 0;

  // Model
  virtual OpBytes bytes(const Embed&) const = 0;
  virtual void embed_forward(const Embed&) = 0;
  virtual void embed_backward(const Embed&, const EmbedGrads&) = 0;

  virtual OpBytes bytes(const Qkv&) const = 0;
  virtual void qkv_forward(const Qkv&) = 0;
  virtual void qkv_backward(const Qkv&, const QkvGrads&) = 0;
  // Norm and RoPE alone, dqkv [B, T, H + 2K, D] inout: the gradients at q, k, v → at their products. Of op, q, k, cos,
  // sin and saved are read.
  virtual void heads_backward(const Qkv& op, const TensorView& dqkv) = 0;

  virtual OpBytes bytes(const Attention&) const = 0;
  virtual void attention_forward(const Attention&) = 0;
  virtual void attention_backward(const Attention&, const AttentionGrads&) = 0;

  virtual OpBytes bytes(const ProjectResidual&) const = 0;
  virtual void project_residual_forward(const ProjectResidual&) = 0;
  virtual void project_residual_backward(const ProjectResidual&, const ProjectResidualGrads&) = 0;

  virtual OpBytes bytes(const MlpUp&) const = 0;
  virtual void mlp_up_forward(const MlpUp&) = 0;
  virtual void mlp_up_backward(const MlpUp&, const MlpUpGrads&) = 0;

  virtual OpBytes bytes(const Head&) const = 0;
  virtual void head_logits(const Head&) = 0;
  virtual void head_loss(const Head&) = 0;
  // Forward and backward in one pass over the logits: writes losses too.
  virtual void head_loss_backward(const Head&, const HeadGrads&) = 0;

  // out[m, n] = a[m, k]·b[n, k]ᵀ, all S: the product whose rate everything else is compared with
  virtual void product(const TensorView& a, const TensorView& b, const TensorView& out) = 0;

  // Weights and gradients of a step
  virtual void working_copies(std::span<const WorkingCopy> copies) = 0;
  virtual void finish_projections(std::span<const ProjectionEnd> projections) = 0;
  virtual void add_sum(const TensorView& t, double* sum) = 0;  // *sum += Σ t, in float64; t is M

  // Optimizer                                                                                        §3
  // norm (in float64), clip scale, finite flag and Adam's step count of all gradients together. A step that is not
  // finite sets `stopped`, or where losses are scaled halves the scale; 2,000 finite ones double it.
  virtual void grad_norm(std::span<const TensorView> grads, StepValues* values) = 0;
  virtual void adam(std::span<const AdamTensor> tensors, const StepValues* values) = 0;
  virtual std::size_t muon_scratch(std::span<const MuonTensor> tensors) const = 0;
  virtual void muon(std::span<const MuonTensor> tensors, int ns_steps, const StepValues* values, void* scratch) = 0;
  // out = NS5(u), both [rows, cols] and M; computed in S
  virtual std::size_t newton_schulz_scratch(const TensorView& u) const = 0;
  virtual void newton_schulz(const TensorView& u, const TensorView& out, int steps, void* scratch) = 0;
  // Rows to intN and back, the artifact's: docs/spec.md §4 (amax). q is i8 in a u8 tensor, scale f16.
  virtual void quantize_rows(const TensorView& w, int clip, const TensorView& q, const TensorView& scale) = 0;
  virtual void dequantize_rows(const TensorView& q, const TensorView& scale, const TensorView& w) = 0;
  // Adapters                                                                                         §5
  // Rows b with documents[b] ≥ 0 ([B] i32) start anew: a ← uniform ±bound, drawn with the document as the counter's
  // last word, b ← 0, m ← 0, v ← 0; the other rows stay.
  virtual void adapters_begin(std::span<const AdapterRows> adapters, const TensorView& documents,
                              std::uint64_t seed) = 0;
  // Rows b with steps[b] = t ≥ 1 ([B] i32) take Adam's step t, without decay; the other rows stay.
  virtual void adapters_step(std::span<const AdapterRows> adapters, const TensorView& steps,
                             const AdapterAdam& settings) = 0;
  // Averaging: y ← a·x + b·y; nothing where gate is given and says `stopped`
  virtual void axpby(double a, const TensorView& x, double b, const TensorView& y, const StepValues* gate) = 0;
};

// The CPU backend for M = f32 or f64, S = M; picks the widest instruction set of this machine, or PGOLF_CPU_ISA.
// With `rounding` bf16 or f16 (and M = f32), S tensors are floats that hold numbers of that dtype: what a GPU computes,
// up to the order of sums.
std::unique_ptr<Backend> make_cpu_backend(DType master, DType rounding);
std::string cpu_isa();  // "avx512", "avx2" or "plain": what make_cpu_backend uses

}  // namespace pgolf
