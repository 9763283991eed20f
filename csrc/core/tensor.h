// TensorView: where a tensor lies and what shape it has. It owns nothing and checks nothing;
// shapes are checked once, at the boundary to Python and when a plan is made.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

// Kernels are compiled once per instruction set from the same headers. Functions that are not
// templates over a kernel's own types must be inlined there, or the linker could keep the AVX-512
// copy for everybody.
#if defined(_MSC_VER)
#define PGOLF_INLINE __forceinline
#else
#define PGOLF_INLINE inline __attribute__((always_inline))
#endif

namespace pgolf {

enum class DType : std::uint8_t { f32, f64, i32, u8, bf16, f16 };

PGOLF_INLINE constexpr std::size_t size_of(DType t) {
  switch (t) {
    case DType::f64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::u8:
      break;
  }
  return 1;
}

inline constexpr int kMaxRank = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::int64_t shape[kMaxRank] = {1, 1, 1, 1};

  TensorView() = default;
  PGOLF_INLINE TensorView(DType type, std::initializer_list<std::int64_t> dims, void* where = nullptr)
      : data(where), dtype(type) {
    for (std::int64_t dim : dims) shape[rank++] = dim;
  }

  PGOLF_INLINE std::int64_t size() const { return shape[0] * shape[1] * shape[2] * shape[3]; }
  PGOLF_INLINE std::size_t bytes() const { return static_cast<std::size_t>(size()) * size_of(dtype); }
  PGOLF_INLINE explicit operator bool() const { return rank > 0; }  // an absent tensor has rank 0

  template <class T>
  PGOLF_INLINE T* as() const {
    return static_cast<T*>(data);
  }
};

// `count` rows of an axis before which there is none, or ones of length 1, from the first-th on.
PGOLF_INLINE TensorView part_of(const TensorView& t, int axis, std::int64_t first, std::int64_t count) {
  const std::size_t row = t.bytes() / static_cast<std::size_t>(t.shape[axis]);
  TensorView part = t;
  part.shape[axis] = count;
  if (t.data) part.data = static_cast<char*>(t.data) + static_cast<std::size_t>(first) * row;
  return part;
}

}  // namespace pgolf
