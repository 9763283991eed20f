// Which GPUs there are and whether this library can use them, asked without opening any of them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <string_view>

namespace pgolf::cuda {

struct Finding {  // what is missing, in a word and as a sentence; both empty: nothing
  const char* missing = "";
  std::string sentence;
};

int driver_version();  // the newest CUDA that the driver supports, as 1000·major + 10·minor; 0: no driver
Finding find_devices(int& count);
Finding find_device(int device, cudaDeviceProp& properties);
cudaDeviceProp usable_device(int device);  // throws DeviceError where something is missing

// "GPU 0 (NVIDIA H100 80GB HBM3, compute capability 9.0)"
std::string name_of(int device, const cudaDeviceProp& properties);

// Whether code compiled for a list such as "90a-real,80-virtual" (CMake's notation) runs on a GPU of compute capability
// 10·major + minor. Machine code (-real) and that of a family (100f) runs within its major version, PTX on all that
// comes later, code for one chip's own features (90a) on that chip alone.
constexpr bool runs_on(std::string_view list, int capability) {
  while (!list.empty()) {
    const std::string_view entry = list.substr(0, list.find(','));
    list.remove_prefix(std::min(entry.size() + 1, list.size()));
    int built = 0;
    std::size_t i = 0;
    for (; i < entry.size() && entry[i] >= '0' && entry[i] <= '9'; ++i) built = 10 * built + (entry[i] - '0');
    const char kind = i < entry.size() ? entry[i] : ' ';
    const bool one_major = kind == 'f' || entry.ends_with("-real");
    if (kind == 'a' ? capability == built : capability >= built && (!one_major || capability / 10 == built / 10))
      return true;
  }
  return false;
}
static_assert(runs_on("75-real,80-virtual", 75) && runs_on("75-real,80-virtual", 121) && runs_on("86-real", 89));
static_assert(!runs_on("86-real", 80) && !runs_on("80-real", 90) && !runs_on("80-virtual", 75) && runs_on("80", 120));
static_assert(runs_on("90a-real", 90) && !runs_on("90a", 100) && runs_on("100f", 103) && !runs_on("100f", 120));

}  // namespace pgolf::cuda
