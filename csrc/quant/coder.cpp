#include "quant/coder.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <utility>

namespace pgolf::quant {
namespace {

// ---- Range coder

constexpr std::uint64_t kLeastRange = std::uint64_t{1} << 32;
constexpr std::uint32_t kMostUses = 1023;

// A node's rate after n uses, in units of 2⁻¹⁶: 1/(n + 1.5), as Krichevsky and Trofimov estimate a constant
// probability. It ends at 1/1024: weights of one tensor hardly drift.
constexpr auto kRates = [] {
  std::array<std::uint32_t, kMostUses + 1> rates{};
  for (std::uint32_t n = 0; n <= kMostUses; ++n) rates[n] = (2u << 16) / (2 * n + 3);
  return rates;
}();

// The probability that a bit is one: upper 22 bits, in units of 2⁻²²; lower 10 bits: how often it was used.
class Node {
 public:
  // In units of 2⁻¹⁶, 1 … 65535.
  std::uint32_t probability() const { return (state_ >> 16) | 1u; }

  void update(unsigned bit) {
    const std::uint32_t uses = state_ & kMostUses;
    const auto p = static_cast<std::int64_t>(state_ >> 10);
    const std::int64_t target = (std::int64_t{bit} << 22) - bit;
    const std::int64_t moved = p + ((target - p) * kRates[uses] >> 16);
    state_ = static_cast<std::uint32_t>(moved) << 10 | (uses + (uses < kMostUses));
  }

 private:
  std::uint32_t state_ = 1u << 31;
};

// Both coders have the same face, so that a model is written once: what an encoder is given, a decoder ignores, and
// both return it. Modelled bits stand at the stream's beginning: they narrow [low, low + range), of which ones take the
// lower part. Plain bits stand at its end, the first in the lowest bit of the last byte.
class Encoder {
 public:
  static constexpr bool kDecodes = false;

  unsigned bit(Node& node, unsigned bit) {
    const std::uint64_t bound = (range_ >> 16) * node.probability();
    if (bit) {
      range_ = bound;
    } else {
      advance(bound);
      range_ -= bound;
    }
    if (range_ < kLeastRange) [[unlikely]] {
      put(4);
      range_ <<= 32;
    }
    node.update(bit);
    return bit;
  }

  unsigned plain(int count, unsigned value) {
    held_ |= static_cast<std::uint64_t>(value) << holds_;
    for (holds_ += count; holds_ >= 8; holds_ -= 8) {
      plain_.push_back(static_cast<std::uint8_t>(held_));
      held_ >>= 8;
    }
    return value;
  }

  std::vector<std::uint8_t> finish() {
    // As few bytes as name a number of the interval whatever follows: the decoder finds plain bits there.
    int left = 56;
    std::uint64_t mask, step;
    for (;; left -= 8) {
      mask = (std::uint64_t{1} << left) - 1;
      step = (~low_ + 1) & mask;  // to the next multiple of 2^left
      if (step < range_ && range_ - step > mask) break;
    }
    advance(step);
    put(8 - left / 8);
    if (holds_ > 0) plain_.push_back(static_cast<std::uint8_t>(held_));
    bytes_.insert(bytes_.end(), plain_.rbegin(), plain_.rend());
    return std::move(bytes_);
  }

 private:
  void advance(std::uint64_t step) {
    low_ += step;
    if (low_ >= step) return;
    for (auto byte = bytes_.rbegin(); ++*byte == 0;) ++byte;  // the carry; it ends, for all are below 1 together
  }

  void put(int count) {
    for (; count > 0; --count, low_ <<= 8) bytes_.push_back(static_cast<std::uint8_t>(low_ >> 56));
  }

  std::vector<std::uint8_t> bytes_, plain_;
  std::uint64_t low_ = 0, range_ = ~std::uint64_t{0}, held_ = 0;
  int holds_ = 0;
};

class Decoder {
 public:
  static constexpr bool kDecodes = true;

  Decoder(const std::uint8_t* stream, std::size_t size)
      : begin_(stream), end_(stream + size), next_(stream), plain_(stream + size) {
    offset_ = word();
    offset_ = offset_ << 32 | word();
  }

  unsigned bit(Node& node, unsigned) {
    const std::uint64_t bound = (range_ >> 16) * node.probability();
    const unsigned bit = offset_ < bound;
    const std::uint64_t zero = std::uint64_t{bit} - 1;  // all ones for a zero: a branch would be guessed wrongly
    offset_ -= bound & zero;
    range_ = bound ^ ((bound ^ (range_ - bound)) & zero);
    if (range_ < kLeastRange) [[unlikely]] {
      range_ <<= 32;
      offset_ = offset_ << 32 | word();
    }
    node.update(bit);
    return bit;
  }

  unsigned plain(int count, unsigned) {
    for (; holds_ < count; holds_ += 8) {
      held_ |= static_cast<std::uint64_t>(plain_ > begin_ ? *--plain_ : 0) << holds_;
    }
    const auto value = static_cast<unsigned>(held_ & ((std::uint64_t{1} << count) - 1));
    held_ >>= count;
    holds_ -= count;
    return value;
  }

 private:
  std::uint64_t word() {
    std::uint64_t value = 0;
    for (int i = 0; i < 4; ++i) value = value << 8 | (next_ < end_ ? *next_++ : 0u);
    return value;
  }

  const std::uint8_t *begin_, *end_, *next_, *plain_;
  std::uint64_t range_ = ~std::uint64_t{0}, offset_ = 0, held_ = 0;  // offset: the stream's number less low
  int holds_ = 0;
};

// A number of `bits` bits, the highest first, each in the context of those above it: nodes has 2^bits, the first
// unused.
template <class Coder>
unsigned code_number(Coder& coder, Node* nodes, int bits, unsigned number) {
  unsigned path = 1;
  for (int i = bits; i-- > 0;) path = path << 1 | coder.bit(nodes[path], number >> i & 1u);
  return path - (1u << bits);
}

// ---- Models

// What is known of a column lasts for this many rows, and columns this far apart share it.
constexpr std::int64_t kColumnMemory = 256;
constexpr std::int64_t kColumns = 1 << 16;
// A row's mean begins as if it had had this many values of the rows before, and is looked at after as many.
constexpr std::int64_t kChunk = 16;

std::size_t modelled(std::int64_t columns) { return static_cast<std::size_t>(std::min(columns, kColumns)); }
std::size_t column_of(std::int64_t j) { return static_cast<std::size_t>(j & (kColumns - 1)); }

// Weights of a trained matrix are close to normal once they are divided by a factor for their row and one for their
// column. The model estimates |q| from both, and has a distribution for every quarter octave of the estimate.
constexpr int kFraction = 8;         // of means
constexpr int kColumnFraction = 12;  // of a column's factor
constexpr std::int64_t kColumnOne = 1 << kColumnFraction;
constexpr std::int64_t kMostMean = 128 << kFraction;
constexpr std::int64_t kMostFactor = 64;  // and its inverse is the least
constexpr int kLevels = 4 * std::bit_width(static_cast<std::uint64_t>(kMostMean * kMostFactor));

// 4·log₂ of an expected |q|, with the mantissa's upper two bits as fraction.
unsigned level_of(std::int64_t expected) {
  const auto value = static_cast<std::uint64_t>(std::max<std::int64_t>(expected, 4));
  const int exponent = std::bit_width(value) - 1;
  return static_cast<unsigned>(4 * exponent) + static_cast<unsigned>(value >> (exponent - 2) & 3u);
}

// Integer: std::int8_t, const for an encoder.
template <class Coder, class Integer>
void code_integers(Coder& coder, Integer* q, std::int64_t rows, std::int64_t columns) {
  unsigned largest = 0;
  if constexpr (!Coder::kDecodes) {
    for (std::int64_t i = 0; i < rows * columns; ++i) largest = std::max(largest, unsigned(std::abs(int{q[i]})));
  }
  const int bits = std::min(static_cast<int>(coder.plain(4, unsigned(std::bit_width(largest)))), 8);
  if (bits == 0) {
    if constexpr (Coder::kDecodes) std::fill_n(q, rows * columns, std::int8_t{0});
    return;
  }
  std::vector<Node> nodes(std::size_t{kLevels} << bits);
  std::vector<std::int32_t> column(modelled(columns), kColumnOne);
  std::int64_t typical = std::int64_t{1} << (kFraction - 2 + bits);  // mean |q| of the rows so far
  for (std::int64_t r = 0; r < rows; ++r) {
    Integer* row = q + r * columns;
    std::int64_t mean = typical, sum = 0, weight = 0;
    for (std::int64_t begin = 0; begin < columns; begin += kChunk) {
      const std::int64_t end = std::min(begin + kChunk, columns);
      for (std::int64_t j = begin; j < end; ++j) {
        const std::int64_t factor = column[column_of(j)];
        Node* distribution = &nodes[std::size_t{level_of(mean * factor >> kColumnFraction)} << bits];
        const unsigned magnitude = code_number(coder, distribution, bits, unsigned(std::abs(int{row[j]})));
        const bool negative = magnitude != 0 && coder.plain(1, row[j] < 0) != 0;
        if constexpr (Coder::kDecodes) {
          row[j] = static_cast<std::int8_t>(negative ? -int(magnitude) : int(magnitude));
        }
        sum += magnitude;
        weight += factor;
      }
      const std::int64_t known = kChunk * typical * kColumnOne + (sum << (kFraction + kColumnFraction));
      mean = std::clamp<std::int64_t>(known / (kChunk * kColumnOne + weight), 1, kMostMean);
    }
    if (sum == 0) continue;
    mean = std::clamp<std::int64_t>((sum << (kFraction + kColumnFraction)) / weight, 1, kMostMean);
    const std::int64_t rate = std::min(r + 2, kColumnMemory);
    typical += (mean - typical) / rate;
    const std::int64_t unit = (kColumnOne << (kFraction + kColumnFraction)) / mean;
    for (std::int64_t j = 0; j < columns; ++j) {
      std::int32_t& factor = column[column_of(j)];
      const std::int64_t found = std::abs(int{row[j]}) * unit >> kColumnFraction;
      factor = static_cast<std::int32_t>(
          std::clamp(factor + (found - factor) / rate, kColumnOne / kMostFactor, kColumnOne * kMostFactor));
    }
  }
}

template <class Bits>
struct Format;
template <>
struct Format<std::uint16_t> {
  static constexpr int exponent = 5, mantissa = 10;
};
template <>
struct Format<std::uint32_t> {
  static constexpr int exponent = 8, mantissa = 23;
};

// A float's bits without the sign are its logarithm, nearly. The exponent is coded in the context of the logarithm that
// row and column let expect, in half octaves; the mantissa's upper bits in that of the exponent; the rest is plain.
// Float: an unsigned integer, const for an encoder.
template <class Coder, class Float>
void code_floats(Coder& coder, Float* values, std::int64_t rows, std::int64_t columns) {
  using Bits = std::remove_const_t<Float>;
  constexpr int kExponent = Format<Bits>::exponent, kMantissa = Format<Bits>::mantissa;
  constexpr int kModelled = 4, kPlain = kMantissa - kModelled;
  constexpr int kLog = kMantissa - 8;  // logarithms have 8 bits of fraction
  constexpr int kHighest = (2 << kExponent) - 1;
  constexpr std::int64_t kMemory = 64;
  std::vector<Node> exponents(std::size_t{kHighest + 1} << kExponent);
  std::vector<Node> mantissas(std::size_t{1} << (kExponent + kModelled));
  Node sign;
  std::vector<std::int32_t> column(modelled(columns), 0);  // mean logarithm
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t rate = std::min(r + 1, kMemory);
    std::int64_t deviation = 0;  // of the row's logarithms from their columns' means
    for (std::int64_t j = 0; j < columns; ++j) {
      Float& value = values[r * columns + j];
      std::int32_t& mean = column[column_of(j)];
      const auto level = std::clamp<std::int64_t>((mean + deviation / (j + kChunk)) >> 7, 0, kHighest);
      const unsigned exponent = code_number(coder, &exponents[static_cast<std::size_t>(level) << kExponent], kExponent,
                                            unsigned(value >> kMantissa) & ((1u << kExponent) - 1));
      const unsigned upper = code_number(coder, &mantissas[std::size_t{exponent} << kModelled], kModelled,
                                         unsigned(value >> kPlain) & ((1u << kModelled) - 1));
      const unsigned rest = coder.plain(kPlain, unsigned(value) & ((1u << kPlain) - 1));
      const unsigned negative = coder.bit(sign, unsigned(value >> (kExponent + kMantissa)));
      const unsigned magnitude = exponent << kMantissa | upper << kPlain | rest;
      if constexpr (Coder::kDecodes) value = static_cast<Bits>(negative << (kExponent + kMantissa) | magnitude);
      const auto found = static_cast<std::int32_t>(magnitude >> kLog);
      deviation += found - mean;
      mean += static_cast<std::int32_t>((found - mean) / rate);
    }
  }
}

}  // namespace

std::vector<std::uint8_t> encode_integers(const std::int8_t* q, const std::uint16_t* scale, std::int64_t rows,
                                          std::int64_t columns) {
  Encoder coder;
  code_floats(coder, scale, rows, 1);
  code_integers(coder, q, rows, columns);
  return coder.finish();
}

void decode_integers(const std::uint8_t* stream, std::size_t size, std::int64_t rows, std::int64_t columns,
                     std::int8_t* q, std::uint16_t* scale) {
  Decoder coder(stream, size);
  code_floats(coder, scale, rows, 1);
  code_integers(coder, q, rows, columns);
}

template <class Bits>
std::vector<std::uint8_t> encode_floats(const Bits* values, std::int64_t rows, std::int64_t columns) {
  Encoder coder;
  code_floats(coder, values, rows, columns);
  return coder.finish();
}

template <class Bits>
void decode_floats(const std::uint8_t* stream, std::size_t size, std::int64_t rows, std::int64_t columns,
                   Bits* values) {
  Decoder coder(stream, size);
  code_floats(coder, values, rows, columns);
}

template std::vector<std::uint8_t> encode_floats(const std::uint16_t*, std::int64_t, std::int64_t);
template std::vector<std::uint8_t> encode_floats(const std::uint32_t*, std::int64_t, std::int64_t);
template void decode_floats(const std::uint8_t*, std::size_t, std::int64_t, std::int64_t, std::uint16_t*);
template void decode_floats(const std::uint8_t*, std::size_t, std::int64_t, std::int64_t, std::uint32_t*);

}  // namespace pgolf::quant
