#include "model/product_rate.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "model/gpt.h"

namespace pgolf {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSampleSeconds = 0.01;  // beside which the start and the end of a sample do not show

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

double product_rate(Backend& backend, std::int64_t m, std::int64_t n, std::int64_t k,
                    std::span<const unsigned char> values, double seconds) {
  DeviceMemory memory[3];
  const auto matrix = [&](int index, std::int64_t rows, std::int64_t columns) {
    TensorView view(backend.dtype(), {rows, columns});
    memory[index].reserve(backend, view.bytes());
    view.data = memory[index].data();
    return view;
  };
  std::size_t next = 0;  // of the values: b goes on where a ended
  const auto fill = [&](const TensorView& view) {
    for (std::size_t at = 0; at < view.bytes();) {
      const std::size_t piece = std::min(values.size() - next, view.bytes() - at);
      backend.upload(view.as<char>() + at, values.data() + next, piece);
      at += piece;
      next = (next + piece) % values.size();
    }
  };
  const TensorView a = matrix(0, m, k), b = matrix(1, n, k), out = matrix(2, m, n);
  fill(a);
  fill(b);

  const auto run = [&](int times) {  // seconds of one
    backend.synchronize();
    const auto start = Clock::now();
    for (int i = 0; i < times; ++i) backend.product(a, b, out);
    backend.synchronize();
    return since(start) / times;
  };
  double one = run(1);
  for (const auto start = Clock::now(); since(start) < seconds / 2;) one = run(1);
  const int times = std::max(1, static_cast<int>(kSampleSeconds / one));
  std::vector<double> samples;
  const auto start = Clock::now();
  do samples.push_back(run(times));
  while (since(start) < seconds);
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / *middle;
}

}  // namespace pgolf
