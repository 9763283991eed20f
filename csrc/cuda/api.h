// The C ABI between Python's extension (csrc/device) and the library of the CUDA backend (csrc/cuda).
//
// The library exports one function, pgolf_cuda_open, which returns a table of functions. Each takes plain values and
// pointers and returns a Status; no exception crosses. Structs cross as they are: both sides are compiled from these
// files, which the build stamp, first in the table for ever, proves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "pieces.h"

namespace pgolf::abi {

enum Status : int {
  kDone,
  kInvalidArgument,
  kDeviceError,
  kNonFiniteError,
  kOtherError,
  kCallbackFailed,  // the callback of `capture` reported that it had failed
};

// A string; longer ones are cut.
struct Text {
  char text[4096] = "";

  void set(std::string_view s) noexcept {
    const std::size_t size = std::min(s.size(), sizeof text - 1);
    std::memcpy(text, s.data(), size);
    text[size] = 0;
  }
};

// How an argument or a result crosses: `pack` on this side, `unpack` on the other. Numbers and pointers as they are, …
template <class T>
struct Abi {
  using Type = T;
  static Type pack(T value) { return value; }
  static T unpack(Type value) { return value; }
};
template <>
struct Abi<void> {
  using Type = void;
};
// … references as pointers, …
template <class T>
struct Abi<const T&> {
  using Type = const T*;
  static Type pack(const T& value) { return &value; }
  static const T& unpack(Type value) { return *value; }
};
// … spans as pointer and size, …
template <class T>
struct Abi<std::span<T>> {
  struct Type {
    T* data;
    std::size_t size;
  };
  static Type pack(std::span<T> value) { return {value.data(), value.size()}; }
  static std::span<T> unpack(Type value) { return {value.data, value.size}; }
};
// … strings as characters, …
template <>
struct Abi<std::string> {
  using Type = Text;
  static Type pack(const std::string& value) {
    Type packed;
    packed.set(value);
    return packed;
  }
  static std::string unpack(const Type& value) { return value.text; }
};
// … and what `capture` calls as a function that returns whether it succeeded. What it threw stays on its own side.
struct Callback {
  bool (*call)(void* context) noexcept;
  void* context;
};
struct CallbackFailed {};  // thrown inside the library alone
template <>
struct Abi<const std::function<void()>&> {
  using Type = Callback;
  static std::function<void()> unpack(Type value) {
    return [value] {
      if (!value.call(value.context)) throw CallbackFailed();
    };
  }
};

// What a method of Backend or Pieces looks like in the table.
template <class Result, class... Arguments>
struct AbiMethod {
  using Function = Status(void* self, typename Abi<Result>::Type* result,
                          typename Abi<Arguments>::Type... arguments) noexcept;
};
template <class Method>
struct AbiMethodOf;
template <class Face, class R, class... A>
struct AbiMethodOf<R (Face::*)(A...)> {
  using Type = AbiMethod<R, A...>;
};
template <class Face, class R, class... A>
struct AbiMethodOf<R (Face::*)(A...) const> {
  using Type = AbiMethod<R, A...>;
};
template <class Face, class R, class... A>
struct AbiMethodOf<R (Face::*)(A...) noexcept> {
  using Type = AbiMethod<R, A...>;
};

// What this machine lacks before a model can live on one of its GPUs; both empty: nothing.
struct Problem {
  const char* missing = "";  // in a word, CudaStatus::missing
  Text sentence;
};
struct Driver {
  int version;  // the newest CUDA that it supports, as 1000·major + 10·minor; 0: there is none
  int devices;
  Problem problem;
};
struct Device {
  Text name;
  int major, minor;  // compute capability
  std::uint64_t memory;
  Problem problem;
};
struct BlasInfo {
  Text path;
  int version;  // 10000·major + 100·minor + patch
};

struct Api {
  const char* stamp;
  int runtime;               // the CUDA that the library was compiled with, as Driver::version
  const char* compiled_for;  // CUDA architectures, as CMake names them: "90a-real,80-virtual"

  void (*driver)(Driver* found) noexcept;
  void (*device)(int index, Device* found) noexcept;
  // Opens cuBLASLt, which lies in one of the folders if it is no system library. Needs no GPU.
  Status (*open_blas)(const char* const* folders, std::size_t count, BlasInfo* found, Text* message) noexcept;
  std::int64_t (*allocations)() noexcept;  // on the host, since the library was loaded

  Status (*create)(int device, DType storage, void** self, Text* message) noexcept;
  void (*destroy)(void* self) noexcept;
  const char* (*message)(const void* self) noexcept;  // of the last status that was not kDone

#define PGOLF_METHOD(result, name, parameters, arguments) AbiMethodOf<decltype(&Backend::name)>::Type::Function* name;
#include "backend_methods.def"
#include "sublayer_methods.def"
#undef PGOLF_METHOD
#define PGOLF_METHOD(result, name, parameters, arguments) AbiMethodOf<decltype(&Pieces::name)>::Type::Function* name;
#include "piece_methods.def"
#undef PGOLF_METHOD
  AbiMethodOf<decltype(&Backend::capture)>::Type::Function* capture;
};

inline constexpr const char* kOpenName = "pgolf_cuda_open";
using Open = const Api*() noexcept;

}  // namespace pgolf::abi
