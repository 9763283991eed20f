#include "core/shared_library.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace pgolf {

#if defined(_WIN32)

SharedLibrary SharedLibrary::loaded(const char* name) { return SharedLibrary(GetModuleHandleA(name)); }

SharedLibrary SharedLibrary::open(const std::string& name, std::string& why) {
  HMODULE handle = LoadLibraryA(name.c_str());
  if (!handle) why = "Windows error " + std::to_string(GetLastError());
  return SharedLibrary(handle);
}

void* SharedLibrary::address(const char* name) const {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle_), name));
}

std::string file_of(const void* code) {
  HMODULE module = nullptr;
  char path[MAX_PATH] = "";
  if (GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                         static_cast<const char*>(code), &module))
    GetModuleFileNameA(module, path, MAX_PATH);
  return path;
}

#else

SharedLibrary SharedLibrary::loaded(const char* name) { return SharedLibrary(dlopen(name, RTLD_NOLOAD | RTLD_LAZY)); }

SharedLibrary SharedLibrary::open(const std::string& name, std::string& why) {
  void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) why = dlerror();
  return SharedLibrary(handle);
}

void* SharedLibrary::address(const char* name) const { return dlsym(handle_, name); }

std::string file_of(const void* code) {
  Dl_info info{};
  return dladdr(code, &info) && info.dli_fname ? info.dli_fname : "";
}

#endif

}  // namespace pgolf
