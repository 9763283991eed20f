// Memory, and the entry point of this instruction set.
#include "cpu/cpu_backend.h"

#include <cstring>

#include "core/memory.h"

#define PGOLF_STRING2(x) #x
#define PGOLF_STRING(x) PGOLF_STRING2(x)

PGOLF_CPU_BEGIN

template <class T>
std::string CpuBackend<T>::description() const {
  return std::string("cpu " PGOLF_STRING(PGOLF_ISA) ", ") + (sizeof(T) == 8 ? "float64" : "float32") + ", " +
         std::to_string(concurrency()) + (concurrency() == 1 ? " thread" : " threads");
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
void CpuBackend<T>::capture(int, const std::function<void()>& fn) {
  fn();
}

std::unique_ptr<Backend> make_backend(DType dtype) {
  if (dtype == DType::f64) return std::make_unique<CpuBackend<double>>();
  return std::make_unique<CpuBackend<float>>();
}

PGOLF_CPU_END
