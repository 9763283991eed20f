// The library's side of the C ABI: its one exported function.
#include "cuda/api.h"

#include <cuda_runtime.h>

#include <memory>
#include <new>
#include <utility>

#include "build_stamp.h"
#include "core/error.h"
#include "core/memory.h"
#include "cuda/blas.h"
#include "cuda/cuda_backend.h"
#include "cuda/devices.h"

#if defined(_WIN32)
#define PGOLF_EXPORT extern "C" __declspec(dllexport)
#else
#define PGOLF_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace pgolf::cuda {
namespace {

using namespace abi;

// Runs body; what it throws becomes a status and a message.
template <class Body>
Status guard(Text& message, Body&& body) noexcept {
  try {
    body();
    return kDone;
  } catch (const CallbackFailed&) {
    return kCallbackFailed;
  } catch (const std::invalid_argument& e) {
    message.set(e.what());
    return kInvalidArgument;
  } catch (const DeviceError& e) {
    message.set(e.what());
    return kDeviceError;
  } catch (const NonFiniteError& e) {
    message.set(e.what());
    return kNonFiniteError;
  } catch (const std::bad_alloc&) {
    message.set("The system refused memory.");
    return kDeviceError;
  } catch (const std::exception& e) {
    message.set(e.what());
    return kOtherError;
  } catch (...) {
    message.set("Unknown exception.");
    return kOtherError;
  }
}

struct Instance {
  std::unique_ptr<Backend> backend;
  Text message;  // of the last call that failed
};

Backend& face_of(const Instance& instance, const Backend*) { return *instance.backend; }
Pieces& face_of(const Instance& instance, const Pieces*) { return instance.backend->pieces(); }

// A method of Backend or Pieces, which is the Face, as it stands in the table.
template <auto method, class Face, class R, class... A>
Status call(void* self, typename Abi<R>::Type* result, typename Abi<A>::Type... arguments) noexcept {
  auto& instance = *static_cast<Instance*>(self);
  return guard(instance.message, [&] {
    Face& face = face_of(instance, static_cast<const Face*>(nullptr));
    if constexpr (std::is_void_v<R>)
      (face.*method)(Abi<A>::unpack(arguments)...);
    else
      *result = Abi<R>::pack((face.*method)(Abi<A>::unpack(arguments)...));
  });
}
template <auto method, class Face, class R, class... A>
constexpr auto entry(AbiMethod<R, A...>) {
  return &call<method, Face, R, A...>;
}
template <class Face, auto method>
constexpr auto entry() {
  return entry<method, Face>(typename AbiMethodOf<decltype(method)>::Type());
}

Problem pack(const Finding& finding) {
  Problem problem{finding.missing, {}};
  problem.sentence.set(finding.sentence);
  return problem;
}

void driver(Driver* found) noexcept {
  found->version = driver_version();
  found->problem = pack(find_devices(found->devices));
}

void device(int index, Device* found) noexcept {
  cudaDeviceProp properties{};
  found->problem = pack(find_device(index, properties));
  found->name.set(properties.name);
  found->major = properties.major;
  found->minor = properties.minor;
  found->memory = properties.totalGlobalMem;
}

Status blas(const char* const* folders, std::size_t count, BlasInfo* found, Text* message) noexcept {
  return guard(*message, [&] {
    const BlasLibrary& library = open_blas({folders, folders + count});
    found->path.set(library.path);
    found->version = library.version;
  });
}

Status create(int device, DType storage, void** self, Text* message) noexcept {
  return guard(*message, [&] { *self = new Instance{std::make_unique<CudaBackend>(device, storage), {}}; });
}

void destroy(void* self) noexcept { delete static_cast<Instance*>(self); }

const char* message(const void* self) noexcept { return static_cast<const Instance*>(self)->message.text; }

constexpr Api make_api() {
  Api api{};
  api.stamp = PGOLF_BUILD_STAMP;
  api.runtime = CUDART_VERSION;
  api.compiled_for = PGOLF_COMPILED_FOR;
  api.driver = driver;
  api.device = device;
  api.open_blas = blas;
  api.allocations = allocation_count;
  api.create = create;
  api.destroy = destroy;
  api.message = message;
#define PGOLF_METHOD(result, name, parameters, arguments) api.name = entry<Backend, &Backend::name>();
#include "backend_methods.def"
#include "sublayer_methods.def"
#undef PGOLF_METHOD
#define PGOLF_METHOD(result, name, parameters, arguments) api.name = entry<Pieces, &Pieces::name>();
#include "piece_methods.def"
#undef PGOLF_METHOD
  api.capture = entry<Backend, &Backend::capture>();
  return api;
}

constexpr Api kApi = make_api();

}  // namespace
}  // namespace pgolf::cuda

PGOLF_EXPORT const pgolf::abi::Api* pgolf_cuda_open() noexcept { return &pgolf::cuda::kApi; }
