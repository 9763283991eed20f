// What the attention kernels share: their arguments, the tile scheduler, the launchers.
//
// Three kernels, each of which loads tiles of rows into shared memory while it works on those before:
//   forward  a block owns a tile of queries of one head and walks over the keys they see
//   dq       the same walk again
//   dkdv     a block owns a tile of keys of one key/value head and walks over the queries that see them, head by head
// Nothing of size T×T is stored: backward recomputes the probabilities from the log-sum-exp of each row.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/head_width.h"
#include "cuda/qk_norm_rope_tiles.cuh"

namespace pgolf::cuda {

inline constexpr i64 kMostElements = i64{1} << 30;  // of a sequence: offsets in one are 32 bits wide

// Shared memory of a block: what every GPU from sm_75 on allows, and what needs no opt-in
// (cudaFuncAttributeMaxDynamicSharedMemorySize).
inline constexpr std::size_t kSharedOnEveryGpu = 64 * 1024, kSharedWithoutOptIn = 48 * 1024;

template <class S>
struct AttentionArgs {
  int batch, T, H, K, D;
  int queries;        // the last of T positions: fewer than T in forward alone
  float root;         // 1/√D
  bool normed;        // |q·k| ≤ D, but for rounding
  const S* q;         // [batch, queries, H, D]
  const S *k, *v;     // [batch, T, K, D]
  const float* gain;  // [H]
  S* o;
  float* lse;  // [batch, H, queries] log-sum-exp of a row's scores, to the base 2 (float32: e)

  __host__ __device__ int group() const { return H / K; }        // query heads of a key/value head
  __host__ __device__ int first() const { return T - queries; }  // the first query's position
  // Row t of a head lies t·H·D, of a key/value head t·K·D elements behind its first.
  __device__ i64 head_at(int b, int h) const { return (static_cast<i64>(b) * queries * H + h) * D; }
  __device__ i64 kv_head_at(int b, int kv) const { return (static_cast<i64>(b) * T * K + kv) * D; }
  __device__ i64 row_at(int b, int h) const { return (static_cast<i64>(b) * H + h) * queries; }
};

template <class S>
struct AttentionGradArgs {
  const S *o, *d_o;
  S* dqkv;       // [batch, T, H + 2K, D]
  float* delta;  // [batch, H, T] gain·Σ dO⊙O of a row (sm90/: QueryRows); dq writes it, dkdv reads it
  float* dgain;  // [H, batch, tiles of queries] what each block of dq (sm90/: each warp) adds to its head's gain
  QkNormRopeArgs norms;  // sm90/ alone: past them

  // Of dqkv: the row of a sequence's first position, for query head h, key/value head H + kv, or value head H + K + kv;
  // and from a position's row to the next.
  __device__ S* head(const AttentionArgs<S>& a, int b, int h) const {
    return dqkv + (static_cast<i64>(b) * a.T * (a.H + 2 * a.K) + h) * a.D;
  }
  __device__ static int stride(const AttentionArgs<S>& a) { return (a.H + 2 * a.K) * a.D; }
};

// The order of blocks: longest first, and L2-aware. Sections of heads whose keys and values fit L2 follow each other;
// within a section the tiles of all its heads are ordered by rank, and rank 0 has the most work.
struct TileScheduler {
  static constexpr i64 kSectionBytes = 16 << 20;
  int heads, tiles, section;

  // `group` neighbouring heads read the same `bytes`.
  TileScheduler(int all_heads, int tiles_of_head, int group, i64 bytes)
      : heads(all_heads),
        tiles(tiles_of_head),
        section(static_cast<int>(std::min<i64>(all_heads, std::max<i64>(1, kSectionBytes / bytes) * group))) {}
  unsigned blocks() const { return static_cast<unsigned>(heads) * static_cast<unsigned>(tiles); }

  struct Place {
    int head, rank;
  };
  __device__ Place at(unsigned block) const {
    const int first = static_cast<int>(block / (static_cast<unsigned>(section) * tiles)) * section;
    const int rest = static_cast<int>(block - static_cast<unsigned>(first) * tiles);
    const int width = min(section, heads - first);
    return {first + rest % width, rest / width};
  }
};

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), unsigned blocks, int threads, std::size_t shared,
            cudaStream_t stream, const Args&... args) {
  if (shared > kSharedWithoutOptIn)
    PGOLF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<blocks, threads, shared, stream>>>(args...);
  PGOLF_LAUNCHED(name);
}

// S = bf16 and f16 in attention_bf16.cu and attention_f16.cu, float in attention_f32.cu.
template <class S>
struct AttentionKernels {
  static int dq_rows(int D);  // queries of a dq block
  static void forward(const AttentionArgs<S>& a, cudaStream_t stream);
  static void backward(const AttentionArgs<S>& a, const AttentionGradArgs<S>& g, cudaStream_t stream);
};

}  // namespace pgolf::cuda
