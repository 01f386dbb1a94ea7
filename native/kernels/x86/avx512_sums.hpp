// Sums of products of weights with activation digits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/x86/avx512_vectors.hpp"

namespace entrollm {
namespace {

// Adds the products of unsigned weights with signed digits to `sums`. GCC 12 copies accumulators of
// the intrinsic around in loops, which costs more than the products.
inline void add_products(__m512i& sums, __m512i weights, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "vm"(digits));
}

// 256 * high + low, summed over lanes. 64 vectors keep each lane below 64 * 4 * 255 * 32896 < 2^31.
inline std::int64_t reduce_digits(__m512i high, __m512i low) {
  const __m512i lanes = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  const __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)),
                                        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1)));
  return _mm512_reduce_add_epi64(wide);
}

// The totals of four vectors, those of each 128 bits apart, in turn.
inline __m512i total_quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
  const auto pair = [](__m512i v, __m512i w) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(v, w), _mm512_unpackhi_epi32(v, w));
  };
  const __m512i ab = pair(a, b), cd = pair(c, d);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// 256 * high + low of eight sums, summed over lanes: totals of digits, over kDotRowsColumns
// columns, are below 2^31.
inline __m512i reduce_eight(const __m512i (&high)[8], const __m512i (&low)[8]) {
  const auto halves = [](__m512i v, __m512i w) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(v, w, 0x44), _mm512_shuffle_i64x2(v, w, 0xee));
  };
  const __m512i highs = halves(total_quarters(high[0], high[1], high[2], high[3]),
                               total_quarters(high[4], high[5], high[6], high[7]));
  const __m512i lows = halves(total_quarters(low[0], low[1], low[2], low[3]),
                              total_quarters(low[4], low[5], low[6], low[7]));
  const __m512i totals = _mm512_add_epi32(_mm512_shuffle_i64x2(highs, lows, 0x88),
                                          _mm512_shuffle_i64x2(highs, lows, 0xdd));
  return _mm512_add_epi64(
      _mm512_slli_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(totals)), 8),
      _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(totals, 1)));
}

// Four sums of each digit, which do not wait for each other. Indices are constants throughout,
// which keeps the sums in registers.
class DigitSums {
 public:
  DigitSums() : DigitSums(_mm512_setzero_si512()) {}

  template <std::size_t Index>
  void add(__m512i weights, const std::int8_t* high, const std::int8_t* low) {
    add_products(high_[Index], weights, load(high));
    add_products(low_[Index], weights, load(low));
  }

  // The total of column `Column`, to which every Columns-th sum belongs; Columns is 1, 2 or 4.
  template <std::size_t Columns, std::size_t Column>
  std::int64_t total() const {
    return reduce_digits(sum<Columns, Column>(high_), sum<Columns, Column>(low_));
  }

 private:
  explicit DigitSums(__m512i zero) : high_{zero, zero, zero, zero}, low_{zero, zero, zero, zero} {}

  template <std::size_t Columns, std::size_t Column>
  static __m512i sum(const __m512i (&v)[4]) {
    if constexpr (Columns == 4) return v[Column];
    if constexpr (Columns == 2) return _mm512_add_epi32(v[Column], v[Column + 2]);
    return _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3]));
  }

  __m512i high_[4];
  __m512i low_[4];
};

}  // namespace
}  // namespace entrollm
