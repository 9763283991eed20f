#include "device/cuda_proxy.h"

#include <exception>
#include <stdexcept>
#include <type_traits>

#include "core/error.h"

namespace pgolf {
namespace {

using namespace abi;

// An entry of the table as a function that takes and returns what the method does.
template <class C>
struct Remote;
template <class R, class... A>
struct Remote<AbiMethod<R, A...>> {
  const Api& api;
  void* self;
  typename AbiMethod<R, A...>::Function* function;

  R operator()(A... arguments) const {
    if constexpr (std::is_void_v<R>) {
      check(function(self, nullptr, Abi<A>::pack(arguments)...));
    } else {
      typename Abi<R>::Type result{};
      check(function(self, &result, Abi<A>::pack(arguments)...));
      return Abi<R>::unpack(result);
    }
  }
  void check(Status status) const {
    if (status != kDone) throw_status(status, api.message(self));
  }
};

class CudaProxy final : public Backend, public Pieces {
 public:
  CudaProxy(const Api& api, void* self) : api_(api), self_(self) {}
  ~CudaProxy() override { api_.destroy(self_); }
  CudaProxy(const CudaProxy&) = delete;
  CudaProxy& operator=(const CudaProxy&) = delete;

#define PGOLF_METHOD(result, name, parameters, arguments) \
  result name parameters override { return remote<decltype(&Backend::name)>(api_.name) arguments; }
#include "backend_methods.def"
#include "sublayer_methods.def"
#undef PGOLF_METHOD
#define PGOLF_METHOD(result, name, parameters, arguments) \
  result name parameters override { return remote<decltype(&Pieces::name)>(api_.name) arguments; }
#include "piece_methods.def"
#undef PGOLF_METHOD
  Pieces& pieces() override { return *this; }

  // What fn throws waits here while the library ends the recording.
  int capture(int recording, const std::function<void()>& fn) override {
    struct Context {
      const std::function<void()>& fn;
      std::exception_ptr thrown;
    } context{fn, nullptr};
    const Callback callback{[](void* c) noexcept {
                              auto& context = *static_cast<Context*>(c);
                              try {
                                context.fn();
                                return true;
                              } catch (...) {
                                context.thrown = std::current_exception();
                                return false;
                              }
                            },
                            &context};
    int result = 0;
    const Status status = api_.capture(self_, &result, recording, callback);
    if (context.thrown) std::rethrow_exception(context.thrown);
    throw_status(status, api_.message(self_));
    return result;
  }

 private:
  template <class Method>
  Remote<typename AbiMethodOf<Method>::Type> remote(typename AbiMethodOf<Method>::Type::Function* function) const {
    return {api_, self_, function};
  }

  const Api& api_;
  void* self_;
};

}  // namespace

void throw_status(Status status, const char* message) {
  switch (status) {
    case kDone:
      return;
    case kInvalidArgument:
      throw std::invalid_argument(message);
    case kDeviceError:
      throw DeviceError(message);
    case kNonFiniteError:
      throw NonFiniteError(message);
    default:
      throw std::runtime_error(message);
  }
}

std::unique_ptr<Backend> make_cuda_proxy(const Api& api, int device, DType storage) {
  void* self = nullptr;
  Text message;
  throw_status(api.create(device, storage, &self, &message), message.text);
  return std::make_unique<CudaProxy>(api, self);
}

}  // namespace pgolf
