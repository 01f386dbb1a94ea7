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
