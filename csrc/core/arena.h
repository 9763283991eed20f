// A planned arena: every buffer is declared with its size and its lifetime, then all are placed at
// once, buffers whose lifetimes do not meet sharing memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace pgolf {

struct PlannedBuffer {
  std::string name;
  std::size_t bytes;
  int first, last;  // the buffer is alive during the ticks [first, last]
  std::size_t offset = 0;
};

class ArenaPlan {
 public:
  // Returns the buffer's index. A buffer of 0 bytes is legal and takes no room.
  int add(std::string name, std::size_t bytes, int first, int last);

  // Places all buffers (largest first, each at the lowest offset free during its lifetime);
  // returns the arena's size in bytes.
  std::size_t solve();

  const std::vector<PlannedBuffer>& buffers() const { return buffers_; }
  std::size_t offset(int index) const { return buffers_[index].offset; }

 private:
  std::vector<PlannedBuffer> buffers_;
};

}  // namespace pgolf
