// Lays buffers into an operation's saved or scratch area. Run once with a null base to learn the size,
// again with the real base to get the pointers: the two can never disagree.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/memory.h"
#include "cpu/isa.h"

PGOLF_CPU_BEGIN

class Layout {
 public:
  explicit Layout(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class U>
  U* take(std::int64_t count) {
    U* pointer = base_ ? reinterpret_cast<U*>(base_ + used_) : nullptr;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(U);
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return pointer;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// One area for each worker of the pool.
template <class U>
struct PerWorker {
  U* base;
  std::int64_t stride;  // elements, a multiple of a cache line

  PerWorker(Layout& layout, int workers, std::int64_t count)
      : stride((count * static_cast<std::int64_t>(sizeof(U)) + 63) / 64 * 64 / static_cast<std::int64_t>(sizeof(U))) {
    base = layout.take<U>(stride * workers);
  }
  U* of(int worker) const { return base + stride * worker; }
};

PGOLF_CPU_END
