// What products of flat rows in registers of 32 bytes share. Internal linkage, as in
// generic/flat_pack.hpp.
#pragma once

#include "kernels/x86/flat_avx2.hpp"

namespace entrollm {
namespace {

struct FlatTotals {
  using Lanes = FlatLanes;
  using Sums = __m256i;

  [[gnu::always_inline]] static inline __m256i load(const std::int8_t* digits) {
    return FlatLanes::load(digits);
  }

  [[gnu::always_inline]] static inline void total(__m256i a, __m256i b, __m256i c, __m256i d,
                                                  std::int32_t* out) {
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i totals =
        _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), totals);
  }
};

}  // namespace
}  // namespace entrollm
