// Multi-tensor launches: the tensors' pointers are a kernel parameter, and each tensor has blocks of its own.
#pragma once

#include "cuda/common.cuh"

namespace pgolf::cuda {

inline constexpr std::size_t kParameterBytes = 4000;  // of the 4,096 that a launch takes everywhere

// The last of `count` rising numbers that is at most `block`; the first one is.
__device__ __forceinline__ int last_at_most(const unsigned* first, int count, unsigned block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= block ? low : high) = middle;
  }
  return low;
}

template <class Entry>
struct TensorList {
  static constexpr int kEntries = static_cast<int>((kParameterBytes - 8) / (sizeof(Entry) + sizeof(unsigned)));
  Entry entries[kEntries];
  unsigned first[kEntries];  // the block at which an entry begins
  int count = 0;
  unsigned blocks = 0;

  void add(const Entry& entry, i64 its_blocks) {
    entries[count] = entry;
    first[count++] = blocks;
    blocks += static_cast<unsigned>(its_blocks);
  }

  __device__ int entry_of(unsigned block) const { return last_at_most(first, count, block); }
};

// Calls launch(list) until every item was in a list; blocks_of(entry) may be 0, for an empty tensor.
template <class Items, class Make, class BlocksOf, class Launch>
void multi_tensor_apply(const Items& items, Make&& make, BlocksOf&& blocks_of, Launch&& launch) {
  using Entry = decltype(make(items[0]));
  TensorList<Entry> batch;
  static_assert(sizeof batch <= kParameterBytes);
  for (const auto& item : items) {
    const Entry entry = make(item);
    const i64 blocks = blocks_of(entry);
    if (blocks == 0) continue;
    if (batch.count == TensorList<Entry>::kEntries) {
      launch(batch);
      batch.count = 0;
      batch.blocks = 0;
    }
    batch.add(entry, blocks);
  }
  if (batch.count > 0) launch(batch);
}

inline constexpr int kThreads = 256;

// A thread's share of a chunk of kPieces·4·kThreads floats, kPieces loads in flight. `left` counts the floats from the
// chunk's start to the tensor's end; what lies beyond reads as 0 and is not written. Addresses are aligned to 16 bytes.
template <int kPieces>
struct Elements {
  static constexpr i64 kChunk = kPieces * 4 * kThreads;
  static constexpr int kCount = kPieces * 4;
  alignas(16) float x[kCount];

  static __device__ __forceinline__ i64 at(int piece) { return 4 * (static_cast<i64>(piece) * kThreads + threadIdx.x); }
  __device__ __forceinline__ void load(const float* from, i64 left) {
    if (left >= kChunk) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
        *reinterpret_cast<float4*>(x + 4 * p) = *reinterpret_cast<const float4*>(from + at(p));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const i64 j = at(i / 4) + i % 4;
        x[i] = j < left ? from[j] : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void store(float* to, i64 left) const {
    if (left >= kChunk) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
        *reinterpret_cast<float4*>(to + at(p)) = *reinterpret_cast<const float4*>(x + 4 * p);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const i64 j = at(i / 4) + i % 4;
        if (j < left) to[j] = x[i];
      }
    }
  }
};

}  // namespace pgolf::cuda
