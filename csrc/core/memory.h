// Aligned memory, counted. The counters exist for one promise: nothing is allocated while training.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf {

inline constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector register

inline constexpr std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void* allocate_aligned(std::size_t bytes);  // throws DeviceError with the size that was asked for
void free_aligned(void* pointer) noexcept;

// Every allocation this library made since it was loaded: aligned blocks and operator new.
std::int64_t allocation_count() noexcept;

}  // namespace pgolf
