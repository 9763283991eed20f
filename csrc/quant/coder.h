// Entropy coding of a tensor's payload, the streams of docs/spec.md §4: a range coder with adaptive models, in the
// context of the magnitudes that a value's row and column have had so far. Integer arithmetic alone: the same tensor
// gives the same bytes everywhere.
//
// A decoder takes any bytes: it reads zeros where they end, and fills the tensor with something. Whether that is what
// was encoded, a checksum must say. Beyond the tensor both take at most 800 KiB, whatever its shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pgolf::quant {

// q: (rows, columns), row-major; scale: one fp16 bit pattern a row.
std::vector<std::uint8_t> encode_integers(const std::int8_t* q, const std::uint16_t* scale, std::int64_t rows,
                                          std::int64_t columns);
void decode_integers(const std::uint8_t* stream, std::size_t size, std::int64_t rows, std::int64_t columns,
                     std::int8_t* q, std::uint16_t* scale);

// Bit patterns of fp16 (uint16) or fp32 (uint32), (rows, columns), row-major.
template <class Bits>
std::vector<std::uint8_t> encode_floats(const Bits* values, std::int64_t rows, std::int64_t columns);
template <class Bits>
void decode_floats(const std::uint8_t* stream, std::size_t size, std::int64_t rows, std::int64_t columns, Bits* values);

}  // namespace pgolf::quant
