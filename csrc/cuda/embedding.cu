// Token and bigram embedding, norm and smear gate; backward with ordered scatter-adds.
//
// With a projection, P = bigram_emb·projᵀ [n, d] is made once a call: there are fewer buckets than tokens.
//
// Rounded to S. Forward: x0 alone; P is float32, and rows before the gate are recomputed where a token reads its
// predecessor's. Backward: dsum, the gradient at the sum of embeddings; with a projection also scale·dP, where the
// gradient dP at P, float32, sums dsum over the tokens that read a row. The rest is float32.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/column_reduce.cuh"
#include "cuda/gemm_args.h"

namespace pgolf::cuda {
namespace {

struct Dims {
  i64 N, T, V, d, n, e;
  bool bigram, project;
  explicit Dims(const Embed& op)
      : N(op.ids.shape[0] * op.ids.shape[1]),
        T(op.ids.shape[1]),
        V(op.tok_emb.shape[0]),
        d(op.tok_emb.shape[1]),
        n(op.bigram_emb.shape[0]),
        e(op.bigram_emb.shape[1]),
        bigram(op.bigram_emb),
        project(op.bigram_proj) {}
  Linear projection(DType S) const { return {S, n, e, d}; }  // P from bigram_emb
};

constexpr int kRun = 8;     // neighbouring tokens of a team, which hands each row on to the next token
constexpr int kShare = 64;  // sorted readers whose rows one warp sums
constexpr int kThreads = 256;

i64 shares(i64 readers) { return (readers + kShare - 1) / kShare; }
i64 table_blocks(i64 numbers) { return std::min<i64>(blocks_for(numbers, kThreads * kVector), 1024); }

int bits_of(i64 rows) {  // of a row's number
  int bits = 1;
  while ((rows - 1) >> bits) ++bits;
  return bits;
}

// Which token reads which row of a table, and the same ordered by row, tokens of a row in their order.
struct Readers {
  std::uint32_t *row, *sorted_row, *token, *sorted_token;
  void* sort_room;
  std::size_t sort_bytes;
  float* parts;  // [shares, 2, d] sums of rows that a share has in common with a neighbour

  Readers(Layout& layout, const Dims& s)
      : row(layout.take<std::uint32_t>(s.N)),
        sorted_row(layout.take<std::uint32_t>(s.N)),
        token(layout.take<std::uint32_t>(s.N)),
        sorted_token(layout.take<std::uint32_t>(s.N)),
        sort_bytes(std::max(bytes_to_sort(s.N, s.V), bytes_to_sort(s.N, s.n))) {
    sort_room = layout.take<char>(static_cast<i64>(sort_bytes));
    parts = layout.take<float>(shares(s.N) * 2 * s.d);
  }

  void sort(i64 N, i64 rows, cudaStream_t stream) const {
    std::size_t room = sort_bytes;
    PGOLF_CUDA(cub::DeviceRadixSort::SortPairs(sort_room, room, row, sorted_row, token, sorted_token,
                                               static_cast<int>(N), 0, bits_of(rows), stream));
  }

 private:
  static std::size_t bytes_to_sort(i64 N, i64 rows) {
    std::size_t room = 0;
    const std::uint32_t* in = nullptr;
    std::uint32_t* out = nullptr;
    PGOLF_CUDA(cub::DeviceRadixSort::SortPairs(nullptr, room, in, out, in, out, static_cast<int>(N), 0, bits_of(rows)));
    return room;
  }
};

struct BackwardScratch {
  float* projected;  // P [n, d]
  void* dsum;        // [N, d]
  float* dgate;      // [column_blocks, d] partial gradients
  Readers readers;
  float* dtable;  // [n, d] Σ dsum over the readers of a bigram row: dP
  void* dscaled;  // [n, d] scale·dP
  float* dscale;  // [table_blocks] partial gradients
  BackwardScratch(Layout& layout, DType S, const Dims& s)
      : projected(layout.take<float>(s.project ? s.n * s.d : 0)),
        dsum(layout.take(S, s.N * s.d)),
        dgate(layout.take<float>(column_blocks(s.N) * s.d)),
        readers(layout, s),
        dtable(layout.take<float>(s.bigram ? s.n * s.d : 0)),
        dscaled(layout.take(S, s.project ? s.n * s.d : 0)),
        dscale(layout.take<float>(s.bigram ? table_blocks(s.n * s.d) : 0)) {}
};

// What kernels read of the operation.
template <class S>
struct Source {
  const std::int32_t* ids;
  const S *tok, *bigram;   // bigram: [n, d], null where there is none or it is projected
  const float* projected;  // P, or null
  const float *scale, *gate;
  i64 N;
  int T, d, n;
  bool reset_at_bos;
  std::int32_t bos_id;

  Source(const Embed& op, const Dims& s, const float* P)
      : ids(op.ids.as<std::int32_t>()),
        tok(op.tok_emb.as<S>()),
        bigram(s.bigram && !s.project ? op.bigram_emb.as<S>() : nullptr),
        projected(s.project ? P : nullptr),
        scale(s.bigram ? op.bigram_scale.as<float>() : nullptr),
        gate(op.smear_gate.as<float>()),
        N(s.N),
        T(static_cast<int>(s.T)),
        d(static_cast<int>(s.d)),
        n(static_cast<int>(s.bigram ? s.n : 0)),
        reset_at_bos(op.reset_at_bos),
        bos_id(op.bos_id) {}

  __device__ int position(i64 token) const { return static_cast<int>(static_cast<std::uint32_t>(token) % T); }
  __device__ int bucket(i64 token) const {
    if (position(token) == 0) return n - 1;
    const auto hash = static_cast<std::int32_t>((36313u * static_cast<std::uint32_t>(ids[token])) ^
                                                (27191u * static_cast<std::uint32_t>(ids[token - 1])));
    const std::int32_t remainder = hash % (n - 1);
    return remainder < 0 ? remainder + (n - 1) : remainder;
  }
  // Whether a token takes a share of the one before it.
  __device__ bool smears(i64 token) const { return position(token) != 0 && !(reset_at_bos && ids[token] == bos_id); }
};

// The rows that a run of tokens reads: lane i of every warp looks up the i-th, all get it from there.
struct Lookup {
  int id, bucket;
  bool smears;
  template <class S>
  __device__ Lookup(const Source<S>& from, i64 first) {
    i64 token = first + threadIdx.x % kWarp;
    token = token < 0 ? 0 : token < from.N ? token : from.N - 1;
    id = from.ids[token];
    bucket = from.n ? from.bucket(token) : 0;
    smears = from.smears(token);
  }
  __device__ int id_of(int i) const { return __shfl_sync(0xffffffffu, id, i); }
  __device__ int bucket_of(int i) const { return __shfl_sync(0xffffffffu, bucket, i); }
  __device__ bool smears_at(int i) const { return __shfl_sync(0xffffffffu, smears, i); }
};

// A thread's share of tok_emb[id] + scale·(bigram row).
template <int kVectors, class S>
__device__ __forceinline__ void sum_embeddings(const Source<S>& from, const Team& team, int id, int bucket, float scale,
                                               Vector8 (&x)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = team.column(v);
    if (column >= from.d) break;
    x[v] = load8(from.tok + i64{id} * from.d + column);
    if (from.n == 0) continue;
    const i64 at = i64{bucket} * from.d + column;
    const Vector8 b = from.projected ? load8(from.projected + at) : load8(from.bigram + at);
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[v].x[j] = fmaf(scale, b.x[j], x[v].x[j]);
  }
}

template <int kVectors>
__device__ __forceinline__ void load_gate(const float* gate, const Team& team, int d, Vector8 (&g)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (team.column(v) >= d) break;
    g[v] = load8(gate + team.column(v));
#pragma unroll
    for (int j = 0; j < kVector; ++j) g[v].x[j] = 1.0f / (1.0f + expf(-g[v].x[j]));
  }
}

// x0 and the rms factors; the tables stay in L2, so that memory sees 1 write.
template <class S, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
    embed_rows(Source<S> from, int warps, S* __restrict__ x0, float* __restrict__ factors) {
  const Team team(warps);
  const i64 first = team_row(team) * kRun - 1;  // the predecessor of the run's first token
  const Lookup lookup(from, first);
  const float scale = from.n ? *from.scale : 0.0f;
  Vector8 gate[kVectors], before[kVectors], x[kVectors];
  load_gate(from.gate, team, from.d, gate);
#pragma unroll 1
  for (int i = 0; i <= kRun; ++i) {
    sum_embeddings(from, team, lookup.id_of(i), lookup.bucket_of(i), scale, x);
    float squares = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (team.column(v) >= from.d) break;
#pragma unroll
      for (int j = 0; j < kVector; ++j) squares = fmaf(x[v].x[j], x[v].x[j], squares);
    }
    const float factor = rms_factor(team.sum(squares), from.d);
    const bool smears = lookup.smears_at(i), writes = i > 0 && first + i < from.N;
    if (writes && team.thread == 0) factors[first + i] = factor;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = team.column(v);
      if (column >= from.d) break;
      Vector8 y;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float normed = x[v].x[j] * factor, g = gate[v].x[j];
        y.x[j] = (1.0f - g) * normed;
        if (i > 0 && smears) y.x[j] = fmaf(g, before[v].x[j], y.x[j]);
        before[v].x[j] = normed;
      }
      if (writes) store8(x0 + (first + i) * from.d + column, y);
    }
  }
}

// dsum, the gradient at the sum of embeddings, and that of the gate. Memory-bound: 1 read, 1 write.
template <class S, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
    embed_rows_backward(Source<S> from, int warps, const float* __restrict__ factors, const S* __restrict__ dx0,
                        S* __restrict__ dsum, float* __restrict__ partials) {
  extern __shared__ float shared[];  // [d]
  const Team team(warps);
  const i64 runs = (from.N + kRun - 1) / kRun, step = i64{gridDim.x} * team.teams();
  const float scale = from.n ? *from.scale : 0.0f;
  Vector8 gate[kVectors], dgate[kVectors] = {};
  load_gate(from.gate, team, from.d, gate);
  for (i64 base = i64{blockIdx.x} * team.teams(); base < runs; base += step) {
    const i64 first = (base + team.index) * kRun;
    const Lookup lookup(from, first);
    Packed8<S> dy[kVectors], dy_next[kVectors];
    const auto load_row = [&](i64 token, Packed8<S>(&to)[kVectors]) {
      if (token >= from.N) token = from.N - 1;
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (team.column(v) < from.d) to[v] = load_packed(dx0 + token * from.d + team.column(v));
    };
    load_row(first, dy);
#pragma unroll 1
    for (int i = 0; i < kRun; ++i) {
      const i64 token = first + i;
      const bool works = token < from.N, next_smears = lookup.smears_at(i + 1) && token + 1 < from.N;
      load_row(token + 1, dy_next);
      Vector8 x[kVectors];
      sum_embeddings(from, team, lookup.id_of(i), lookup.bucket_of(i), scale, x);
      const float factor = factors[works ? token : from.N - 1];
      // The gradient at the norm's output: this token's share of its own y, and of the next one's.
      const auto at_norm = [&](int v, int j, const Vector8& own, const Vector8& next) {
        const float g = gate[v].x[j], share = (1.0f - g) * own.x[j];
        return next_smears ? fmaf(g, next.x[j], share) : share;
      };
      float dot = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (team.column(v) >= from.d) break;
        const Vector8 own = unpack(dy[v]), next = unpack(dy_next[v]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          x[v].x[j] *= factor;
          dot = fmaf(x[v].x[j], at_norm(v, j, own, next), dot);
        }
      }
      const float mean = team.sum(dot) / static_cast<float>(from.d);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = team.column(v);
        if (column >= from.d) break;
        const Vector8 own = unpack(dy[v]), next = unpack(dy_next[v]);
        Vector8 out;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          out.x[j] = factor * (at_norm(v, j, own, next) - x[v].x[j] * mean);
          const float along_gate = next_smears ? next.x[j] - own.x[j] : -own.x[j];
          if (works) dgate[v].x[j] = fmaf(x[v].x[j], along_gate, dgate[v].x[j]);
        }
        if (works) store8(dsum + token * from.d + column, out);
        dy[v] = dy_next[v];
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) dgate[v].x[j] *= gate[v].x[j] * (1.0f - gate[v].x[j]);
  }
  store_columns(team, dgate, from.d, shared, partials + i64{blockIdx.x} * from.d);
}

// Which row of tok_emb (or of bigram_emb) every token reads.
template <class S>
__global__ void __launch_bounds__(kThreads)
    list_readers(Source<S> from, bool buckets, std::uint32_t* __restrict__ row, std::uint32_t* __restrict__ token) {
  const i64 i = i64{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= from.N) return;
  row[i] = static_cast<std::uint32_t>(buckets ? from.bucket(i) : from.ids[i]);
  token[i] = static_cast<std::uint32_t>(i);
}

// table[r] += Σ dsum over the readers of r. A warp sums a share of the sorted readers, several rows in flight: frequent
// tokens, some with 5 % of all readers, are spread over many warps. Rows that it does not have in common with a
// neighbouring share it adds at once; of the others it leaves a part, [0] of its first row, [1] of its last.
template <class S, int kVectors>
__global__ void __launch_bounds__(kThreads)
    sum_readers(const std::uint32_t* __restrict__ rows, const std::uint32_t* __restrict__ tokens,
                const S* __restrict__ dsum, i64 readers, int d, float* __restrict__ table, float* __restrict__ parts) {
  constexpr int kAhead = 4;
  const i64 share = (i64{blockIdx.x} * kThreads + threadIdx.x) / kWarp, first = share * kShare;
  if (first >= readers) return;
  const i64 end = first + kShare < readers ? first + kShare : readers;
  const int lane_column = (blockIdx.y * kVectors * kWarp + threadIdx.x % kWarp) * kVector;
  const auto column = [&](int v) { return lane_column + v * kWarp * kVector; };

  Vector8 sum[kVectors] = {};
  std::uint32_t row = rows[first];
  bool common = first > 0 && rows[first - 1] == row;
  int part = 0;  // where the sum goes if its row is common
  const auto flush = [&] {
    float* to = common ? parts + (share * 2 + part) * d : table + i64{row} * d;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) >= d) break;
      if (!common) {
        const Vector8 old = load8<float>(to + column(v));
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum[v].x[j] += old.x[j];
      }
      store8(to + column(v), sum[v]);
      sum[v] = {};
    }
  };
  for (i64 at = first; at < end; at += kAhead) {
    Packed8<S> raw[kAhead][kVectors];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const i64 token = tokens[at + a < end ? at + a : end - 1];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (column(v) < d) raw[a][v] = load_packed(dsum + token * d + column(v));
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (at + a >= end) break;
      if (const std::uint32_t next = rows[at + a]; next != row) {
        flush();
        row = next;
        common = false;
        part = 1;
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (column(v) >= d) break;
        const Vector8 x = unpack(raw[a][v]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum[v].x[j] += x.x[j];
      }
    }
  }
  common = common || (end < readers && rows[end] == row);
  flush();
}

// Adds the parts of a row that shares have in common, in order: one block for every share with which such a row goes on
// from the share in which it began.
__global__ void __launch_bounds__(kThreads) join_parts(const std::uint32_t* __restrict__ rows, i64 count, int d,
                                                       const float* __restrict__ parts, float* __restrict__ table) {
  const i64 second = i64{blockIdx.x} + 1, before = second - 1;
  const std::uint32_t row = rows[second * kShare];
  if (rows[second * kShare - 1] != row) return;
  const bool fills = rows[before * kShare] == row;
  if (fills && before > 0 && rows[before * kShare - 1] == row) return;  // it began further back
  i64 last = second, beyond = count;  // the last share that begins with the row, by bisection
  while (beyond - last > 1) {
    const i64 middle = (last + beyond) / 2;
    (rows[middle * kShare] == row ? last : beyond) = middle;
  }
  for (int column = threadIdx.x; column < d; column += kThreads) {
    float sum = parts[(before * 2 + (fills ? 0 : 1)) * d + column];
#pragma unroll 8
    for (i64 share = second; share <= last; ++share) sum += parts[share * 2 * d + column];
    table[i64{row} * d + column] += sum;
  }
}

// From dtable, Σ dsum over the readers of a bigram row: with P, scale·dP in S; without a projection the row's gradient.
// Partial sums of the gradient of scale, Σ dtable⊙(P or the bigram row). Memory-bound.
template <class S>
__global__ void __launch_bounds__(kThreads)
    end_bigram(Source<S> from, i64 count, const float* __restrict__ dtable, S* __restrict__ dscaled,
               float* __restrict__ dbigram, float* __restrict__ partials) {
  __shared__ float shared[kWarp];
  const float scale = *from.scale;
  float dscale = 0;
  for (i64 at = (i64{blockIdx.x} * kThreads + threadIdx.x) * kVector; at < count;
       at += i64{gridDim.x} * kThreads * kVector) {
    Vector8 g = load8(dtable + at);
    const Vector8 value = from.projected ? load8(from.projected + at) : load8(from.bigram + at);
    Vector8 sum{};
    if (!from.projected) sum = load8<float>(dbigram + at);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      dscale = fmaf(g.x[j], value.x[j], dscale);
      g.x[j] = fmaf(scale, g.x[j], sum.x[j]);
    }
    if (from.projected)
      store8(dscaled + at, g);
    else
      store8(dbigram + at, g);
  }
  dscale = block_sum(dscale, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = dscale;
}

// table += the sum of dsum over its readers
template <class S>
void scatter(cudaStream_t stream, const Source<S>& from, const Dims& s, bool buckets, const BackwardScratch& scratch,
             float* table) {
  const Readers& readers = scratch.readers;
  list_readers<S><<<blocks_for(s.N, kThreads), kThreads, 0, stream>>>(from, buckets, readers.row, readers.token);
  PGOLF_LAUNCHED("list_readers");
  readers.sort(s.N, buckets ? s.n : s.V, stream);
  constexpr i64 kWidest = i64{kWarp} * kVector * kMaxVectors;  // of a warp; wider rows are cut
  with_row_team<kMaxVectors>(std::min(s.d, kWidest), [&](auto vectors, int) {
    const dim3 blocks(blocks_for(shares(s.N), kThreads / kWarp), blocks_for(s.d, vectors * kWarp * kVector));
    sum_readers<S, vectors><<<blocks, kThreads, 0, stream>>>(readers.sorted_row, readers.sorted_token,
                                                             static_cast<const S*>(scratch.dsum), s.N,
                                                             static_cast<int>(s.d), table, readers.parts);
    PGOLF_LAUNCHED("sum_readers");
  });
  if (shares(s.N) == 1) return;
  join_parts<<<static_cast<unsigned>(shares(s.N) - 1), kThreads, 0, stream>>>(
      readers.sorted_row, shares(s.N), static_cast<int>(s.d), readers.parts, table);
  PGOLF_LAUNCHED("join_parts");
}

}  // namespace

OpBytes CudaBackend::embed_bytes(const Embed& op) const {
  use();  // the room to sort depends on the device
  const Dims s(op);
  Layout saved, forward, backward;
  saved.take<float>(s.N);                          // rms factors
  forward.take<float>(s.project ? s.n * s.d : 0);  // P
  BackwardScratch(backward, storage_, s);
  return {saved.used(), forward.used(), backward.used()};
}

void CudaBackend::embed_forward(const Embed& op) {
  const Dims s(op);
  if (s.project)
    gemm(s.projection(storage_).forward(op.bigram_emb.data, op.bigram_proj.data, op.scratch.data, DType::f32));
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    with_row_team<kMaxVectors>(s.d, [&](auto vectors, int warps) {
      embed_rows<S, vectors><<<row_blocks((s.N + kRun - 1) / kRun, warps), kRowThreads, 0, stream()>>>(
          Source<S>(op, s, op.scratch.as<float>()), warps, op.x0.as<S>(), op.saved.as<float>());
      PGOLF_LAUNCHED("embed_rows");
    });
  });
}

void CudaBackend::embed_backward(const Embed& op, const EmbedGrads& grads) {
  use();
  const Dims s(op);
  Layout layout(grads.scratch.data);
  const BackwardScratch scratch(layout, storage_, s);
  const Linear projection = s.projection(storage_);
  if (s.project) gemm(projection.forward(op.bigram_emb.data, op.bigram_proj.data, scratch.projected, DType::f32));
  with_storage(storage_, [&](auto type) {
    using S = decltype(type);
    const Source<S> source(op, s, scratch.projected);
    S* dsum = static_cast<S*>(scratch.dsum);
    const i64 blocks = column_blocks(s.N);
    with_row_team<sizeof(S) == 4 ? 2 : kMaxVectors>(s.d, [&](auto vectors, int warps) {
      embed_rows_backward<S, vectors><<<static_cast<unsigned>(blocks), kRowThreads, s.d * sizeof(float), stream()>>>(
          source, warps, op.saved.as<float>(), grads.dx0.as<S>(), dsum, scratch.dgate);
      PGOLF_LAUNCHED("embed_rows_backward");
    });
    add_columns(stream(), scratch.dgate, blocks, s.d, s.d, grads.smear_gate.as<float>(), s.d, nullptr);
    scatter<S>(stream(), source, s, false, scratch, grads.tok_emb.as<float>());
    if (!s.bigram) return;

    PGOLF_CUDA(cudaMemsetAsync(scratch.dtable, 0, static_cast<std::size_t>(s.n * s.d) * sizeof(float), stream()));
    scatter<S>(stream(), source, s, true, scratch, scratch.dtable);
    const i64 partials = table_blocks(s.n * s.d);
    end_bigram<S><<<static_cast<unsigned>(partials), kThreads, 0, stream()>>>(
        source, s.n * s.d, scratch.dtable, static_cast<S*>(scratch.dscaled), grads.bigram_emb.as<float>(),
        scratch.dscale);
    PGOLF_LAUNCHED("end_bigram");
    add_columns(stream(), scratch.dscale, partials, 1, 1, grads.bigram_scale.as<float>(), 1, nullptr);
  });
  if (!s.project) return;
  Gemm dbigram = projection.backward(scratch.dscaled, op.bigram_proj.data, grads.bigram_emb.data);
  dbigram.out = DType::f32;
  dbigram.beta = 1.0f;
  gemm(dbigram);
  gemm(projection.weights(scratch.dscaled, op.bigram_emb.data, grads.bigram_proj.data));
}

}  // namespace pgolf::cuda
