// The C border between Python's extension (csrc/device) and the library of the CUDA backend (csrc/cuda).
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

#include "backend.h"

namespace pgolf::border {

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
struct Wire {
  using Type = T;
  static Type pack(T value) { return value; }
  static T unpack(Type value) { return value; }
};
template <>
struct Wire<void> {
  using Type = void;
};
// … references as pointers, …
template <class T>
struct Wire<const T&> {
  using Type = const T*;
  static Type pack(const T& value) { return &value; }
  static const T& unpack(Type value) { return *value; }
};
// … spans as pointer and size, …
template <class T>
struct Wire<std::span<T>> {
  struct Type {
    T* data;
    std::size_t size;
  };
  static Type pack(std::span<T> value) { return {value.data(), value.size()}; }
  static std::span<T> unpack(Type value) { return {value.data, value.size}; }
};
// … strings as characters, …
template <>
struct Wire<std::string> {
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
struct Wire<const std::function<void()>&> {
  using Type = Callback;
  static std::function<void()> unpack(Type value) {
    return [value] {
      if (!value.call(value.context)) throw CallbackFailed();
    };
  }
};

// What a method of Backend looks like in the table.
template <class Result, class... Arguments>
struct Crossing {
  using Function = Status(void* self, typename Wire<Result>::Type* result,
                          typename Wire<Arguments>::Type... arguments) noexcept;
};
template <class Method>
struct CrossingOf;
template <class R, class... A>
struct CrossingOf<R (Backend::*)(A...)> {
  using Type = Crossing<R, A...>;
};
template <class R, class... A>
struct CrossingOf<R (Backend::*)(A...) const> {
  using Type = Crossing<R, A...>;
};
template <class R, class... A>
struct CrossingOf<R (Backend::*)(A...) noexcept> {
  using Type = Crossing<R, A...>;
};

// Every method of Backend but `capture`: METHOD(result, name, parameters, arguments), and BYTES(name, struct) for the
// overloads of `bytes`.
// clang-format off
#define PGOLF_BACKEND_METHODS(METHOD, BYTES)                                                                       \
  METHOD(DType, dtype, () const, ())                                                                               \
  METHOD(DType, master_dtype, () const, ())                                                                        \
  METHOD(DType, precision, () const, ())                                                                           \
  METHOD(std::string, description, () const, ())                                                                   \
  METHOD(int, concurrency, () const, ())                                                                           \
  METHOD(void*, allocate, (std::size_t bytes), (bytes))                                                            \
  METHOD(void, release, (void* pointer) noexcept, (pointer))                                                       \
  METHOD(std::size_t, memory_limit, () const, ())                                                                  \
  METHOD(std::size_t, peak_memory, () const, ())                                                                   \
  METHOD(void, upload, (void* to, const void* from, std::size_t bytes), (to, from, bytes))                         \
  METHOD(void, download, (void* to, const void* from, std::size_t bytes), (to, from, bytes))                       \
  METHOD(void, zero, (const TensorView& t), (t))                                                                   \
  METHOD(void, copy, (const TensorView& to, const TensorView& from), (to, from))                                   \
  METHOD(void, synchronize, (), ())                                                                                \
  METHOD(int, read_later, (const void* from, std::size_t bytes), (from, bytes))                                    \
  METHOD(void, wait, (int ticket, void* to, std::size_t bytes), (ticket, to, bytes))                               \
  METHOD(void, forget, (int recording) noexcept, (recording))                                                      \
  BYTES(embed_bytes, Embed)                                                                                        \
  METHOD(void, embed_forward, (const Embed& op), (op))                                                             \
  METHOD(void, embed_backward, (const Embed& op, const EmbedGrads& grads), (op, grads))                            \
  BYTES(qkv_bytes, Qkv)                                                                                            \
  METHOD(void, qkv_forward, (const Qkv& op), (op))                                                                 \
  METHOD(void, qkv_backward, (const Qkv& op, const QkvGrads& grads), (op, grads))                                  \
  METHOD(void, heads_backward, (const Qkv& op, const TensorView& dqkv), (op, dqkv))                                \
  BYTES(attention_bytes, Attention)                                                                                \
  METHOD(void, attention_forward, (const Attention& op), (op))                                                     \
  METHOD(void, attention_backward, (const Attention& op, const AttentionGrads& grads), (op, grads))                \
  BYTES(project_residual_bytes, ProjectResidual)                                                                   \
  METHOD(void, project_residual_forward, (const ProjectResidual& op), (op))                                        \
  METHOD(void, project_residual_backward, (const ProjectResidual& op, const ProjectResidualGrads& grads),          \
         (op, grads))                                                                                              \
  BYTES(mlp_up_bytes, MlpUp)                                                                                       \
  METHOD(void, mlp_up_forward, (const MlpUp& op), (op))                                                            \
  METHOD(void, mlp_up_backward, (const MlpUp& op, const MlpUpGrads& grads), (op, grads))                           \
  BYTES(head_bytes, Head)                                                                                          \
  METHOD(void, head_logits, (const Head& op), (op))                                                                \
  METHOD(void, head_loss, (const Head& op), (op))                                                                  \
  METHOD(void, head_loss_backward, (const Head& op, const HeadGrads& grads), (op, grads))                          \
  METHOD(void, product, (const TensorView& a, const TensorView& b, const TensorView& out), (a, b, out))            \
  METHOD(void, working_copies, (std::span<const WorkingCopy> copies), (copies))                                    \
  METHOD(void, finish_projections, (std::span<const ProjectionEnd> projections), (projections))                    \
  METHOD(void, add_sum, (const TensorView& t, double* sum), (t, sum))                                              \
  METHOD(void, grad_norm, (std::span<const TensorView> grads, StepValues* values), (grads, values))                \
  METHOD(void, adam, (std::span<const AdamTensor> tensors, const StepValues* values), (tensors, values))           \
  METHOD(std::size_t, muon_scratch, (std::span<const MuonTensor> tensors) const, (tensors))                        \
  METHOD(void, muon, (std::span<const MuonTensor> tensors, int ns_steps, const StepValues* values, void* scratch), \
         (tensors, ns_steps, values, scratch))                                                                     \
  METHOD(std::size_t, newton_schulz_scratch, (const TensorView& u) const, (u))                                     \
  METHOD(void, newton_schulz, (const TensorView& u, const TensorView& out, int steps, void* scratch),              \
         (u, out, steps, scratch))                                                                                 \
  METHOD(void, quantize_rows, (const TensorView& w, int clip, const TensorView& q, const TensorView& scale),       \
         (w, clip, q, scale))                                                                                      \
  METHOD(void, dequantize_rows, (const TensorView& q, const TensorView& scale, const TensorView& w),               \
         (q, scale, w))                                                                                            \
  METHOD(void, adapters_begin,                                                                                      \
         (std::span<const AdapterRows> adapters, const TensorView& documents, std::uint64_t seed),                  \
         (adapters, documents, seed))                                                                              \
  METHOD(void, adapters_step,                                                                                       \
         (std::span<const AdapterRows> adapters, const TensorView& steps, const AdapterAdam& settings),            \
         (adapters, steps, settings))                                                                              \
  METHOD(void, axpby, (double a, const TensorView& x, double b, const TensorView& y, const StepValues* gate),      \
         (a, x, b, y, gate))
// clang-format on

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

#define PGOLF_METHOD(result, name, parameters, arguments) \
  CrossingOf<result(Backend::*) parameters>::Type::Function* name;
#define PGOLF_BYTES(name, op) CrossingOf<OpBytes (Backend::*)(const op&) const>::Type::Function* name;
  PGOLF_BACKEND_METHODS(PGOLF_METHOD, PGOLF_BYTES)
#undef PGOLF_METHOD
#undef PGOLF_BYTES
  CrossingOf<decltype(&Backend::capture)>::Type::Function* capture;
};

inline constexpr const char* kOpenName = "pgolf_cuda_open";
using Open = const Api*() noexcept;

}  // namespace pgolf::border
