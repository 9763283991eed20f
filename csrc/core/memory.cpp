#include "core/memory.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "core/error.h"

namespace pgolf {
namespace {
std::atomic<std::int64_t> g_allocations{0};
}

std::int64_t allocation_count() noexcept { return g_allocations.load(std::memory_order_relaxed); }

void* allocate_aligned(std::size_t bytes) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  void* pointer = ::operator new(align_up(bytes ? bytes : 1), std::align_val_t{kAlignment}, std::nothrow);
  if (!pointer) throw DeviceError(sentence("The system refused ", bytes >> 20, " MiB of memory."));
  return pointer;
}

void free_aligned(void* pointer) noexcept { ::operator delete(pointer, std::align_val_t{kAlignment}); }

}  // namespace pgolf

// Replaced for this library alone (its symbols are hidden), so that the counter sees std::vector and
// std::string too. malloc and free keep the pair compatible with the C++ runtime's own operators.
void* operator new(std::size_t bytes) {
  pgolf::g_allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* pointer = std::malloc(bytes ? bytes : 1)) return pointer;
  throw std::bad_alloc();
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }
