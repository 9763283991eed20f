// Initial weights. This file is compiled without contraction, so that they have the same bits on every
// compiler that rounds as IEEE 754 says.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "core/random.h"
#include "model/config.h"

namespace pgolf {
namespace {

inline constexpr std::int64_t kOrthogonalFrom = 64;  // smaller matrices are uniform

// Eight partial sums, always the same ones: an order that every compiler keeps and can vectorise.
double dot(const double* a, const double* b, std::int64_t count) {
  double sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// x −= 2·(v·x)/(v·v)·v, factor = 2/(v·v)
void reflect(const double* v, double factor, std::int64_t count, double* x) {
  const double scale = factor * dot(v, x, count);
  for (std::int64_t i = 0; i < count; ++i) x[i] -= scale * v[i];
}

// The Q of a QR decomposition by Householder reflections, with the sign of R's diagonal folded in.
// `columns` holds the matrix [rows, cols], rows ≥ cols, one column after another, and receives Q.
void orthogonalize(std::vector<double>& columns, std::int64_t rows, std::int64_t cols) {
  std::vector<double> reflectors(columns.size(), 0.0);
  std::vector<double> factor(static_cast<std::size_t>(cols)), sign(static_cast<std::size_t>(cols));
  for (std::int64_t j = 0; j < cols; ++j) {
    double* a = columns.data() + j * rows;
    double* v = reflectors.data() + j * rows;
    const double norm = std::sqrt(dot(a + j, a + j, rows - j));
    const double diagonal = a[j] > 0 ? -norm : norm;
    std::copy(a + j, a + rows, v + j);
    v[j] -= diagonal;
    const double squares = dot(v + j, v + j, rows - j);
    factor[j] = squares > 0 ? 2.0 / squares : 0.0;
    sign[j] = diagonal < 0 ? -1.0 : 1.0;
    for (std::int64_t c = j + 1; c < cols; ++c) reflect(v + j, factor[j], rows - j, columns.data() + c * rows + j);
  }
  for (std::int64_t c = 0; c < cols; ++c) {  // column c of H₀·H₁·… : reflections after c leave the unit vector alone
    double* q = columns.data() + c * rows;
    std::fill(q, q + rows, 0.0);
    q[c] = 1.0;
    for (std::int64_t j = c + 1; j-- > 0;) reflect(reflectors.data() + j * rows + j, factor[j], rows - j, q + j);
    for (std::int64_t i = 0; i < rows; ++i) q[i] *= sign[c];
  }
}

void orthogonal(const TensorRandom& random, std::int64_t out, std::int64_t in, double factor, float* w) {
  const bool transpose = out < in;
  const std::int64_t rows = transpose ? in : out, cols = transpose ? out : in;
  std::vector<double> columns(static_cast<std::size_t>(rows * cols));
  // Element (r, c) of the [out, in] matrix uses draw r·in + c, whichever way it is decomposed.
  const auto at = [&](std::int64_t r, std::int64_t c) -> double& {
    return columns[transpose ? r * rows + c : c * rows + r];
  };
  parallel_for(out, [&](std::int64_t r) {
    for (std::int64_t c = 0; c < in; ++c) at(r, c) = random.normal(static_cast<std::uint64_t>(r * in + c));
  });
  orthogonalize(columns, rows, cols);
  for (std::int64_t r = 0; r < out; ++r)
    for (std::int64_t c = 0; c < in; ++c) w[r * in + c] = static_cast<float>(at(r, c) * factor);
}

}  // namespace

void initialize(const ParameterSpec& spec, std::uint64_t seed, float* out) {
  const std::int64_t size = spec.size();
  const TensorRandom random(seed, spec.name);
  switch (spec.init) {
    case Init::zero:
      std::fill(out, out + size, 0.0f);
      break;
    case Init::one:
      std::fill(out, out + size, 1.0f);
      break;
    case Init::constant:
      std::fill(out, out + size, static_cast<float>(spec.init_value));
      break;
    case Init::residual_mix:  // row 0 = 1, row 1 = 0
      std::fill(out, out + size / 2, 1.0f);
      std::fill(out + size / 2, out + size, 0.0f);
      break;
    case Init::normal:
      parallel_for((size + 4095) / 4096, [&](std::int64_t chunk) {
        for (std::int64_t i = chunk * 4096; i < std::min(size, (chunk + 1) * 4096); ++i)
          out[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)) * spec.init_value);
      });
      break;
    case Init::orthogonal: {
      const std::int64_t rows = spec.shape[0], cols = spec.shape[1];
      if (std::min(rows, cols) >= kOrthogonalFrom) {
        orthogonal(random, rows, cols, spec.init_value, out);
      } else if (spec.name == "bigram.proj.weight") {
        std::fill(out, out + size, 0.0f);
      } else {
        const double bound = 1.0 / std::sqrt(static_cast<double>(cols));
        for (std::int64_t i = 0; i < size; ++i)
          out[i] = static_cast<float>(random.uniform(static_cast<std::uint64_t>(i), bound));
      }
      break;
    }
  }
}

}  // namespace pgolf
