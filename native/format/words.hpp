// The values of the words that lossless matrices have.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace entrollm {

// A number with a sign, `exponent_bits` bits of exponent and the rest of mantissa, in the lowest
// bits of `word`. The largest exponent stands for infinity and NaN, as in IEEE 754.
inline float small_float(unsigned word, int exponent_bits, int mantissa_bits) {
  const unsigned mantissa = word & ((1u << mantissa_bits) - 1);
  const int most = (1 << exponent_bits) - 1;
  const int exponent = static_cast<int>(word >> mantissa_bits) & most;
  const int bias = most / 2;
  float value;
  if (exponent == most) {
    value = mantissa != 0 ? std::numeric_limits<float>::quiet_NaN()
                          : std::numeric_limits<float>::infinity();
  } else {
    const unsigned whole = exponent == 0 ? mantissa : mantissa | 1u << mantissa_bits;
    value = std::ldexp(static_cast<float>(whole),
                       (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
  }
  return (word >> (exponent_bits + mantissa_bits) & 1) != 0 ? -value : value;
}

inline float bfloat16_value(std::uint16_t word) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(word) << 16);
}

inline float half_value(std::uint16_t word) { return small_float(word, 5, 10); }

// E4M3 has no infinity, and one NaN of either sign.
inline float e4m3_value(std::uint8_t word) {
  if ((word & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const int exponent = word >> 3 & 15;
  const float value = std::ldexp(static_cast<float>(exponent == 0 ? word & 7 : (word & 7) | 8),
                                 (exponent == 0 ? 1 : exponent) - 10);
  return (word & 0x80) != 0 ? -value : value;
}

inline float e5m2_value(std::uint8_t word) { return small_float(word, 5, 2); }

}  // namespace entrollm
