#include "core/arena.h"

#include <algorithm>
#include <numeric>

#include "core/memory.h"

namespace pgolf {

int ArenaPlan::add(std::string name, std::size_t bytes, int first, int last) {
  buffers_.push_back({std::move(name), align_up(bytes), first, last});
  return static_cast<int>(buffers_.size()) - 1;
}

std::size_t ArenaPlan::solve() {
  std::vector<int> order(buffers_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return buffers_[a].bytes > buffers_[b].bytes; });

  std::size_t total = 0;
  std::vector<int> placed;  // by offset
  for (int index : order) {
    PlannedBuffer& buffer = buffers_[index];
    std::size_t offset = 0;
    for (int other_index : placed) {
      const PlannedBuffer& other = buffers_[other_index];
      if (other.last < buffer.first || buffer.last < other.first) continue;
      if (offset + buffer.bytes <= other.offset) break;
      offset = std::max(offset, other.offset + other.bytes);
    }
    buffer.offset = offset;
    total = std::max(total, offset + buffer.bytes);
    auto where = std::upper_bound(placed.begin(), placed.end(), offset,
                                  [&](std::size_t at, int i) { return at < buffers_[i].offset; });
    placed.insert(where, index);
  }
  return total;
}

}  // namespace pgolf
