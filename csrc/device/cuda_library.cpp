#include "device/cuda_library.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <utility>

#include "build_stamp.h"
#include "core/error.h"
#include "core/shared_library.h"
#include "device/cuda_proxy.h"

namespace pgolf {
namespace {

using namespace abi;

#if defined(_WIN32)
constexpr const char* kFile = "pgolf_cuda.dll";
#else
constexpr const char* kFile = "libpgolf_cuda.so";
#endif

std::mutex g_mutex;  // guards what follows
const Api* g_api = nullptr;
std::string g_path;  // of the library that g_api came from
std::vector<std::string> g_folders;

struct NoBackend : DeviceError {  // this build of pgolf was made without it
  using DeviceError::DeviceError;
};

std::string library_path() {
  if (const char* named = std::getenv("PGOLF_CUDA_LIBRARY"); named && *named) return named;
  const std::filesystem::path extension = file_of(reinterpret_cast<const void*>(&build_stamp));
  const std::filesystem::path path = extension.parent_path() / kFile;
  std::error_code error;
  if (!std::filesystem::exists(path, error))
    throw NoBackend(sentence("This build of pgolf has no CUDA backend: there is no file ", path.string(),
                             "; install pgolf again where CUDA's compiler nvcc is."));
  return path.string();
}

const Api& open_at(const std::string& path) {
  std::string why;
  const SharedLibrary library = SharedLibrary::open(path, why);
  if (!library) throw DeviceError(sentence("The CUDA backend cannot be opened: ", why, "."));
  auto* open = library.symbol<Open>(kOpenName);
  if (!open) throw DeviceError(sentence(path, " is not a CUDA backend of pgolf: it has no function ", kOpenName, "."));
  const Api& api = *open();
  if (std::strcmp(api.stamp, build_stamp()) != 0)
    throw DeviceError(sentence("The CUDA backend ", path,
                               " was built from other sources than this package: its stamp is ", api.stamp,
                               ", the package's ", build_stamp(), "; install pgolf again."));
  return api;
}

const Api& open_library() {  // throws DeviceError; tries again each time until it has succeeded
  const std::lock_guard lock(g_mutex);
  if (!g_api) {
    g_path = library_path();
    g_api = &open_at(g_path);
  }
  return *g_api;
}

CublasLt open_cublaslt(const Api& api) {
  const std::lock_guard lock(g_mutex);
  std::vector<const char*> folders;
  for (const std::string& folder : g_folders) folders.push_back(folder.c_str());
  BlasInfo found;
  Text message;
  throw_status(api.open_blas(folders.data(), folders.size(), &found, &message), message.text);
  return {found.path.text, found.version};
}

Device usable_device(const Api& api, int device) {  // throws DeviceError
  Device found;
  api.device(device, &found);
  if (*found.problem.missing) throw DeviceError(found.problem.sentence.text);
  return found;
}

}  // namespace

void set_library_folders(std::vector<std::string> folders) {
  const std::lock_guard lock(g_mutex);
  g_folders = std::move(folders);
}

CudaStatus cuda_status() {
  CudaStatus status;
  const auto lacks = [&](const char* missing, const char* problem) {
    status.missing = missing;
    status.problem = problem;
  };
  const Api* api = nullptr;
  try {
    api = &open_library();
  } catch (const NoBackend& e) {
    lacks("backend", e.what());
    return status;
  } catch (const DeviceError& e) {
    lacks("working backend", e.what());
    return status;
  }
  status.library = g_path;
  status.compiled_for = api->compiled_for;
  status.runtime = api->runtime;

  Driver driver;
  api->driver(&driver);
  status.driver = driver.version;
  lacks(driver.problem.missing, driver.problem.sentence.text);
  for (int i = 0; i < driver.devices; ++i) {
    Device found;
    api->device(i, &found);
    status.devices.push_back({found.name.text, found.major, found.minor, found.memory, found.problem.sentence.text});
    if (i == 0) lacks(found.problem.missing, found.problem.sentence.text);
  }
  if (!status.problem.empty()) return status;
  try {
    status.cublaslt = open_cublaslt(*api);
  } catch (const DeviceError& e) {
    lacks("cuBLASLt", e.what());
  }
  return status;
}

CublasLt open_cublaslt() { return open_cublaslt(open_library()); }

DType cuda_dtype(int device) { return usable_device(open_library(), device).major >= 8 ? DType::bf16 : DType::f16; }

std::unique_ptr<Backend> make_cuda_backend(int device, DType storage) {
  const Api& api = open_library();
  (void)usable_device(api, device);
  (void)open_cublaslt(api);
  return make_cuda_proxy(api, device, storage);
}

std::int64_t cuda_allocation_count() noexcept {
  const std::lock_guard lock(g_mutex);
  return g_api ? g_api->allocations() : 0;
}

const char* build_stamp() { return PGOLF_BUILD_STAMP; }

}  // namespace pgolf
