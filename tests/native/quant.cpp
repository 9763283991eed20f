// Row quantisers and pruning: numbers worked out by hand from docs/spec.md §4.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "quant/coder.h"
#include "quant/rows.h"

namespace pgolf::test {
namespace {

void amax() {
  // σ = 7.75 / 31 = 0.25: halves go to the even neighbour. A row of zeros has the smallest normal fp16 scale.
  const std::vector<float> w = {7.75f, -7.75f, 0.125f, 0.375f, -0.625f, 0.374f, 0, 0, 0, 0, 0, 0};
  std::vector<std::int8_t> q(w.size());
  std::uint16_t scale[2];
  quant::quantize_rows_amax(w.data(), 2, 6, 31, q.data(), scale);
  const int expected[] = {31, -31, 0, 2, -2, 1, 0, 0, 0, 0, 0, 0};
  for (std::size_t i = 0; i < w.size(); ++i) CHECK_EQUAL(int{q[i]}, expected[i]);
  CHECK_EQUAL(scale[0], 0x3400);
  CHECK_EQUAL(scale[1], 0x0400);
  std::vector<float> back(w.size());
  quant::dequantize_rows(q.data(), scale, 2, 6, back.data());
  CHECK_EQUAL(back[0], 7.75f);
  CHECK_EQUAL(back[3], 0.5f);
  CHECK_EQUAL(back[7], 0.0f);

  // 1000/15 is 66.6875 in fp16, and -1000 is -14.995 of those.
  const float one = -1000.0f;
  quant::quantize_rows_amax(&one, 1, 1, 15, q.data(), scale);
  CHECK_EQUAL(int{q[0]}, -15);
  CHECK_EQUAL(scale[0], 0x542B);
}

void quantile_floor() {
  const std::vector<float> w = {127.0f, -254.0f, 0.25f};  // three rows; the floor of 1/127 holds the last
  std::vector<std::int8_t> q(3);
  std::uint16_t scale[3];
  quant::quantize_rows_quantile_floor(w.data(), 3, 1, q.data(), scale);
  CHECK_EQUAL(int{q[0]}, 127);
  CHECK_EQUAL(int{q[1]}, -127);
  CHECK_EQUAL(int{q[2]}, 32);
  CHECK_EQUAL(scale[0], 0x3C00);
  CHECK_EQUAL(scale[1], 0x4000);
  CHECK_EQUAL(scale[2], 0x2008);
}

void pruning() {
  std::vector<float> w = {4, -1, 3, -5, 2};
  CHECK_EQUAL(quant::magnitude_quantile(w.data(), 5, 0.5), 3.0f);
  CHECK_EQUAL(quant::magnitude_quantile(w.data(), 5, 0.3), 2.2f);
  quant::prune(w.data(), 5, 0.5);
  const float expected[] = {4, 0, 3, -5, 0};  // 3 is the threshold itself
  for (std::size_t i = 0; i < 5; ++i) CHECK_EQUAL(w[i], expected[i]);
}

// The same bytes on every machine: their number and FNV-1a hash are those of x86-64.
void streams() {
  constexpr std::int64_t rows = 64, columns = 48;
  std::vector<std::int8_t> q(rows * columns), back(q.size());
  std::vector<std::uint16_t> scale(rows), scale_back(rows);
  std::uint32_t state = 1;
  for (auto& value : q) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<std::int8_t>(static_cast<int>(state >> 28) + static_cast<int>(state >> 24 & 15u) - 15);
  }
  for (std::size_t r = 0; r < scale.size(); ++r) scale[r] = static_cast<std::uint16_t>(0x2000 + 37 * r);
  const auto stream = quant::encode_integers(q.data(), scale.data(), rows, columns);
  quant::decode_integers(stream.data(), stream.size(), rows, columns, back.data(), scale_back.data());
  CHECK_EQUAL(back == q, true);
  CHECK_EQUAL(scale_back == scale, true);
  std::uint32_t hash = 2166136261u;
  for (const auto byte : stream) hash = (hash ^ byte) * 16777619u;
  CHECK_EQUAL(stream.size(), std::size_t{1944});
  CHECK_EQUAL(hash, 2200018884u);
}

void refusals() {
  const float w[] = {1.0f, NAN};
  std::int8_t q[2];
  std::uint16_t scale;
  std::string message;
  try {
    quant::quantize_rows_amax(w, 1, 2, 31, q, &scale);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK_EQUAL(message.empty(), false);
}

}  // namespace

void test_quant() {
  amax();
  quantile_floor();
  pruning();
  streams();
  refusals();
}

}  // namespace pgolf::test
