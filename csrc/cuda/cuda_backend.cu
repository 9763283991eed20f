// Which GPU this is, what its code may use and how much of its memory may be taken.
#include "cuda/cuda_backend.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <string_view>

#include "cuda/blas.h"
#include "cuda/common.cuh"
#include "cuda/devices.h"
#include "cuda/transfer.h"

namespace pgolf::cuda {
namespace {

// The kernels of the code that this GPU has loaded.
__global__ void report_kernel_set(KernelSet* set) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  *set = kernel_set_of(__CUDA_ARCH__, true);
#elif defined(__CUDA_ARCH__)
  *set = kernel_set_of(__CUDA_ARCH__, false);
#endif
}

std::string_view environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// For the first calls that need the GPU itself.
void check_usable(cudaError_t status, const std::string& gpu) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  switch (status) {
    case cudaErrorDevicesUnavailable:
      throw DeviceError(sentence(gpu, " is taken: its compute mode is exclusive and another process has it, or ",
                                 "the mode is prohibited. `nvidia-smi -c DEFAULT` lets processes share it."));
    case cudaErrorMemoryAllocation:
      throw DeviceError(sentence(gpu, " has no memory left even to be opened; other processes hold it."));
    default:
      throw DeviceError(sentence(gpu, " does not work: ", cudaGetErrorString(status),
                                 ". `nvidia-smi` shows its state; a lost GPU needs a reset."));
  }
}

KernelSet choose_kernel_set(KernelSet best, const std::string& gpu) {
  const std::string_view forced = environment("PGOLF_CUDA_PATH");
  if (forced.empty()) return best;
  require(forced == "75" || forced == "80" || forced == "90", "PGOLF_CUDA_PATH is \"", forced,
          "\"; expected 75, 80 or 90.");
  const int path = (forced[0] - '0') * 10 + (forced[1] - '0');
  const int most = static_cast<int>(best);
  require(path <= most, "PGOLF_CUDA_PATH is ", path, ", but ", gpu, " runs at most path ", most, " of this build.");
  return static_cast<KernelSet>(path);
}

std::size_t choose_limit(std::size_t total) {
  const std::string_view text = environment("PGOLF_CUDA_MEMORY_LIMIT");
  if (text.empty()) return total;
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string_view unit(end, static_cast<std::size_t>(text.data() + text.size() - end));
  const int shift = unit.empty() ? 0 : unit == "MiB" ? 20 : unit == "GiB" ? 30 : -1;
  require(error == std::errc() && shift >= 0 && number > 0, "PGOLF_CUDA_MEMORY_LIMIT is \"", text,
          "\"; expected a number of bytes, or a whole number and its unit as in 512MiB or 16GiB.");
  return number > total >> shift ? total : static_cast<std::size_t>(number << shift);
}

bool choose_graphs() {
  const std::string_view text = environment("PGOLF_CUDA_GRAPHS");
  require(text.empty() || text == "0" || text == "1", "PGOLF_CUDA_GRAPHS is \"", text,
          "\"; expected 1, or 0 to run every step without recording it.");
  return text != "0";
}

}  // namespace

CudaBackend::CudaBackend(int device, DType storage, Closed) : device_(device), storage_(storage) {}

CudaBackend::CudaBackend(int device, DType storage) : CudaBackend(device, storage, Closed{}) {
  require(storage == DType::f32 || storage == DType::bf16 || storage == DType::f16,
          "The CUDA backend stores activations as float32, bfloat16 or float16.");
  properties_ = usable_device(device);
  const std::string gpu = name_of(device, properties_);
  limit_ = choose_limit(properties_.totalGlobalMem);
  graphs_ = choose_graphs();

  check_usable(cudaSetDevice(device), gpu);
  check_usable(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), gpu);
  partials_ = static_cast<double*>(allocate(kPartials * sizeof(double)));
  KernelSet best = KernelSet::sm75;
  report_kernel_set<<<1, 1, 0, stream_>>>(reinterpret_cast<KernelSet*>(partials_));
  check_usable(cudaGetLastError(), gpu);
  check_usable(cudaMemcpyAsync(&best, partials_, sizeof best, cudaMemcpyDeviceToHost, stream_), gpu);
  check_usable(cudaStreamSynchronize(stream_), gpu);
  kernel_set_ = choose_kernel_set(best, gpu);
  if (storage == DType::bf16 && !has_bf16(kernel_set_))
    throw DeviceError(sentence(gpu, has_bf16(best) ? " on path 75 has" : " has",
                               " no bfloat16 arithmetic; use dtype float16, or float32."));
  blas_ = std::make_unique<Blas>(*this);
  transfer_ = std::make_unique<Transfer>(stream_);
}

CudaBackend::~CudaBackend() {
  (void)cudaSetDevice(device_);
  if (stream_) (void)cudaStreamSynchronize(stream_);
  for (cudaGraphExec_t recording : recordings_)
    if (recording) (void)cudaGraphExecDestroy(recording);
  transfer_.reset();
  blas_.reset();
  release(partials_);
  if (stream_) (void)cudaStreamDestroy(stream_);
  (void)cudaGetLastError();  // of a backend that could not be made: the next one must not see it
}

DType CudaBackend::dtype() const { return storage_; }
DType CudaBackend::master_dtype() const { return DType::f32; }
DType CudaBackend::precision() const { return storage_; }
int CudaBackend::concurrency() const { return 1; }

std::string CudaBackend::description() const {
  const char* dtype = storage_ == DType::bf16 ? "bfloat16" : storage_ == DType::f16 ? "float16" : "float32";
  return sentence("cuda ", properties_.name, ", ", dtype, ", path ", static_cast<int>(kernel_set_));
}

std::size_t CudaBackend::memory_limit() const { return limit_; }
std::size_t CudaBackend::peak_memory() const { return peak_; }

void CudaBackend::use() const { PGOLF_CUDA(cudaSetDevice(device_)); }

}  // namespace pgolf::cuda
