#include "cuda/devices.h"

#include <fstream>

#include "core/error.h"

namespace pgolf::cuda {
namespace {

constexpr int kLeastDriver = 13000;           // CUDA 13.0 …
constexpr const char* kLeastRelease = "580";  // … came with this release of the driver
constexpr int kLeastCapability = 75;          // 10·major + minor: Turing

constexpr const char* kShowsState = ". `nvidia-smi` shows its state.";

// The release of the driver's kernel module, "580.65.06"; empty: none is loaded, or this is not Linux.
std::string driver_release() {
  std::string release;
  std::getline(std::ifstream("/sys/module/nvidia/version"), release);
  return release;
}

Finding find_driver() {
  const int version = driver_version();
  const std::string release = driver_release();
  if (version >= kLeastDriver) return {};
  if (version > 0)
    return {"newer driver",
            sentence("The NVIDIA driver", release.empty() ? "" : " ", release, " is too old: it supports CUDA ",
                     version / 1000, ".", version % 1000 / 10, ", pgolf needs CUDA ", kLeastDriver / 1000, ".",
                     kLeastDriver % 1000 / 10, ", that is driver ", kLeastRelease, " or newer.")};
  if (!release.empty())
    return {"driver",
            sentence("The NVIDIA driver ", release, " is loaded, but its library libcuda.so.1 cannot be opened; a ",
                     "container must be started with access to the GPUs (docker run --gpus all).")};
  return {"driver",
          sentence("No NVIDIA driver is installed; pgolf needs driver ", kLeastRelease, " or newer to use a GPU.")};
}

}  // namespace

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

Finding find_devices(int& count) {
  count = 0;
  if (Finding driver = find_driver(); !driver.sentence.empty()) return driver;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {};
  count = 0;
  (void)cudaGetLastError();
  if (status == cudaSuccess || status == cudaErrorNoDevice)
    return {"GPU", "The NVIDIA driver shows no GPU: there is none, or CUDA_VISIBLE_DEVICES hides it."};
  return {"GPU", sentence("The NVIDIA driver does not start: ", cudaGetErrorString(status), kShowsState)};
}

Finding find_device(int device, cudaDeviceProp& properties) {
  int count;
  if (Finding found = find_devices(count); !found.sentence.empty()) return found;
  if (device < 0 || device >= count)
    return {"GPU", sentence("There is no GPU ", device, "; the numbers of those that can be seen here run from 0 to ",
                            count - 1, ".")};
  if (const cudaError_t status = cudaGetDeviceProperties(&properties, device); status != cudaSuccess) {
    (void)cudaGetLastError();
    return {"GPU", sentence("GPU ", device, " does not answer: ", cudaGetErrorString(status), kShowsState)};
  }
  const std::string gpu = name_of(device, properties);
  const int capability = 10 * properties.major + properties.minor;
  if (capability < kLeastCapability)
    return {"newer GPU", sentence(gpu, " is too old; pgolf needs compute capability ", kLeastCapability / 10, ".",
                                  kLeastCapability % 10, " (Turing) or newer.")};
  if (!runs_on(PGOLF_COMPILED_FOR, capability))
    return {"code for GPU", sentence("This build of pgolf has no code for ", gpu, ", only for ", PGOLF_COMPILED_FOR,
                                     "; build it with PGOLF_CUDA_ARCHITECTURES=native on this machine.")};
  return {};
}

cudaDeviceProp usable_device(int device) {
  cudaDeviceProp properties{};
  if (const Finding found = find_device(device, properties); !found.sentence.empty()) throw DeviceError(found.sentence);
  return properties;
}

std::string name_of(int device, const cudaDeviceProp& properties) {
  return sentence("GPU ", device, " (", properties.name, ", compute capability ", properties.major, ".",
                  properties.minor, ")");
}

}  // namespace pgolf::cuda
