// What Python holds: a model and the lock that serialises the threads using it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "model/gpt.h"

namespace pgolf {

struct NativeModel {
  NativeModel(const pybind11::dict& config, std::optional<std::uint64_t> seed, int device, const std::string& dtype);

  std::shared_ptr<GPT> gpt;
  std::mutex mutex;
  std::int64_t step_allocations = 0;
};

using Polynomials = std::vector<std::array<double, 3>>;  // (a, b, c) each
NewtonSchulzSteps newton_schulz_steps(int steps, const Polynomials& polynomials);

// device −1 is the CPU. There a 16-bit dtype means float32 arithmetic rounded to it where a GPU would store it.
std::unique_ptr<Backend> make_backend(int device, const std::string& dtype);

pybind11::array read_tensor(NativeModel& model, const TensorView& t, const std::vector<std::int64_t>& shape);
void write_tensor(NativeModel& model, const TensorView& t, const std::string& name, const pybind11::array& values);

}  // namespace pgolf
