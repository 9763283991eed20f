// What the attention kernels on Hopper share: heads of 64 numbers, whose rows are 128 bytes, and walks of tiles of
// queries over the keys that they see.
#pragma once

#include "cuda/attention_tiles.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/tensor_map.h"

namespace pgolf::cuda::sm90 {

inline constexpr int kHeadWidth = 64, kHeadRowBytes = kHeadWidth * 2;
// The layout that TMA writes is the one that ldmatrix and ordinary loads read.
static_assert(SharedTile<kHeadWidth>::kRowBytes == kHeadRowBytes && SharedTile<kHeadWidth>::bytes(8) == kSwizzleBytes);

// A block's work: a tile of queries of one head.
template <class Tiles>
struct QueryTile {
  int b, h, kv, first_query, tiles;  // tiles: of keys that some query sees

  template <class S>
  __device__ QueryTile(const AttentionArgs<S>& a, const TileScheduler& order, unsigned block) {
    const TileScheduler::Place place = order.at(block);
    b = place.head / a.H;
    h = place.head % a.H;
    kv = h / a.group();
    first_query = (order.tiles - 1 - place.rank) * Tiles::kQueries;
    tiles = tiles_until(a, first_query + Tiles::kQueries);
  }
  // Tiles of keys that the queries before `end` see.
  template <class S>
  __device__ static int tiles_until(const AttentionArgs<S>& a, int end) {
    return (a.first() + min(end, a.queries) + Tiles::kKeys - 1) / Tiles::kKeys;
  }
};

}  // namespace pgolf::cuda::sm90
