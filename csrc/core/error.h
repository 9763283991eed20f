// Errors as sentences. Only bad requests and exhausted resources throw; kernels do not.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pgolf {

// A device cannot be used or ran out of memory; becomes pgolf.DeviceError.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A weight, gradient or loss is NaN or infinite; becomes pgolf.NonFiniteError.
struct NonFiniteError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// sentence("expected ", 3, " rows") == "expected 3 rows"
template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(sentence(parts...));
}

}  // namespace pgolf
