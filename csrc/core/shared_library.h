// Shared libraries opened at run time, with every symbol looked up: the package imports on machines without them.
#pragma once

#include <string>

namespace pgolf {

// A library that stays open until the process ends: something of it may still be running.
class SharedLibrary {
 public:
  static SharedLibrary loaded(const char* name);                         // one that the process already has, or none
  static SharedLibrary open(const std::string& name, std::string& why);  // none: why holds the system's reason

  explicit operator bool() const { return handle_ != nullptr; }

  template <class Function>
  Function* symbol(const char* name) const {  // null where there is none
    return reinterpret_cast<Function*>(address(name));
  }

 private:
  explicit SharedLibrary(void* handle) : handle_(handle) {}
  void* address(const char* name) const;

  void* handle_;
};

std::string file_of(const void* code);  // the path of the library that a function lies in; empty: it cannot be told

}  // namespace pgolf
