// What the dot products of AVX2 and AVX-VNNI share.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace entrollm {
namespace {  // as in avx2_vectors.hpp

inline __m256i load_digits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// The sum of eight 32-bit integers in 64 bits.
inline std::int64_t sum_lanes(__m256i lanes) {
  const __m256i sums = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1)));
  const __m128i pairs =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_extract_epi64(pairs, 0) + _mm_extract_epi64(pairs, 1);
}

}  // namespace
}  // namespace entrollm
