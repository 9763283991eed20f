// Memory, and the entry point of this instruction set.
#include "cpu/cpu_backend.h"

#include <cstring>

#include "core/memory.h"

#define PGOLF_STRING2(x) #x
#define PGOLF_STRING(x) PGOLF_STRING2(x)

PGOLF_CPU_BEGIN

template <class T>
DType CpuBackend<T>::dtype() const {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}
template <class T>
DType CpuBackend<T>::master_dtype() const {
  return dtype();
}
template <class T>
DType CpuBackend<T>::precision() const {
  return rounding_ == Rounding::bf16 ? DType::bf16 : rounding_ == Rounding::f16 ? DType::f16 : dtype();
}
template <class T>
int CpuBackend<T>::concurrency() const {
  return thread_count();
}
template <class T>
std::string CpuBackend<T>::description() const {
  const char* type = rounding_ == Rounding::bf16  ? "float32 rounded to bfloat16"
                     : rounding_ == Rounding::f16 ? "float32 rounded to float16"
                     : sizeof(T) == 8             ? "float64"
                                                  : "float32";
  return std::string("cpu " PGOLF_STRING(PGOLF_ISA) ", ") + type + ", " + std::to_string(concurrency()) +
         (concurrency() == 1 ? " thread" : " threads");
}
template <class T>
void* CpuBackend<T>::allocate(std::size_t bytes) {
  return allocate_aligned(bytes);
}
template <class T>
void CpuBackend<T>::release(void* pointer) noexcept {
  free_aligned(pointer);
}
template <class T>
std::size_t CpuBackend<T>::memory_limit() const {
  return 0;
}
template <class T>
std::size_t CpuBackend<T>::peak_memory() const {
  return 0;
}
template <class T>
void CpuBackend<T>::upload(void* to, const void* from, std::size_t bytes) {
  if (bytes) std::memcpy(to, from, bytes);  // an empty tensor has no address
}
template <class T>
void CpuBackend<T>::download(void* to, const void* from, std::size_t bytes) {
  if (bytes) std::memcpy(to, from, bytes);  // an empty tensor has no address
}
template <class T>
void CpuBackend<T>::zero(const TensorView& t) {
  std::memset(t.data, 0, t.bytes());
}
template <class T>
void CpuBackend<T>::copy(const TensorView& to, const TensorView& from) {
  std::memcpy(to.data, from.data, from.bytes());
}
template <class T>
void CpuBackend<T>::synchronize() {}
template <class T>
CpuBackend<T>::~CpuBackend() {
  for (Read& read : reads_)
    if (read.large) free_aligned(read.large);
}

template <class T>
int CpuBackend<T>::read_later(const void* from, std::size_t bytes) {
  const int ticket = next_read_;
  next_read_ = (next_read_ + 1) % kReads;
  Read& read = reads_[ticket];
  if (bytes > sizeof read.small && bytes > read.room) {
    if (read.large) free_aligned(read.large);
    read.large = static_cast<unsigned char*>(allocate_aligned(bytes));
    read.room = bytes;
  }
  std::memcpy(bytes > sizeof read.small ? read.large : read.small, from, bytes);
  return ticket;
}

template <class T>
void CpuBackend<T>::wait(int ticket, void* to, std::size_t bytes) {
  const Read& read = reads_[ticket];
  std::memcpy(to, bytes > sizeof read.small ? read.large : read.small, bytes);
}

template <class T>
void CpuBackend<T>::forget(int) noexcept {}

template <class T>
int CpuBackend<T>::capture(int, const std::function<void()>& fn) {
  fn();
  return 0;
}

std::unique_ptr<Backend> make_backend(DType master, DType rounding) {
  if (master == DType::f64) return std::make_unique<CpuBackend<double>>(Rounding::none);
  return std::make_unique<CpuBackend<float>>(rounding == DType::bf16  ? Rounding::bf16
                                             : rounding == DType::f16 ? Rounding::f16
                                                                      : Rounding::none);
}

PGOLF_CPU_END
