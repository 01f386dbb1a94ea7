// What products with group scales of x86 share. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <immintrin.h>

#include "kernels/generic/group_terms.hpp"

namespace entrollm {
namespace {

// Of eight rows, `stride` floats apart, and eight columns; written kGroupedRows floats apart.
[[gnu::always_inline]] inline void transpose_eight(const float* rows, std::size_t stride,
                                                   float* out) {
  __m256 four[8], two[8];
  // Halves of rows i and i + 4, which need no exchange of halves later.
  const auto halves = [&](std::size_t row, std::size_t at) __attribute__((always_inline)) {
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(rows + row * stride + at));
    return _mm256_insertf128_ps(low, _mm_loadu_ps(rows + (row + 4) * stride + at), 1);
  };
  for (std::size_t i = 0; i < 8; ++i) four[i] = halves(i % 4, i / 4 * 4);
  for (std::size_t i = 0; i < 8; i += 4) {
    two[i] = _mm256_unpacklo_ps(four[i], four[i + 1]);
    two[i + 1] = _mm256_unpackhi_ps(four[i], four[i + 1]);
    two[i + 2] = _mm256_unpacklo_ps(four[i + 2], four[i + 3]);
    two[i + 3] = _mm256_unpackhi_ps(four[i + 2], four[i + 3]);
  }
  for (std::size_t i = 0; i < 8; i += 4) {
    float* at = out + i * kGroupedRows;
    _mm256_storeu_ps(at, _mm256_shuffle_ps(two[i], two[i + 2], 0x44));
    _mm256_storeu_ps(at + kGroupedRows, _mm256_shuffle_ps(two[i], two[i + 2], 0xee));
    _mm256_storeu_ps(at + 2 * kGroupedRows, _mm256_shuffle_ps(two[i + 1], two[i + 3], 0x44));
    _mm256_storeu_ps(at + 3 * kGroupedRows, _mm256_shuffle_ps(two[i + 1], two[i + 3], 0xee));
  }
}

inline void transpose_tile(const float* rows, std::size_t groups, float* out) {
  std::size_t group = 0;
  for (; group + 8 <= groups; group += 8) {
    for (std::size_t row = 0; row < kGroupedRows; row += 8) {
      transpose_eight(rows + row * groups + group, groups, out + group * kGroupedRows + row);
    }
  }
  transpose_groups(rows, group, groups, out);
}

// Four bytes of activations in every lane.
[[gnu::always_inline]] inline int load_four(const std::int8_t* x) {
  int four;
  __builtin_memcpy(&four, x, sizeof four);
  return four;
}

}  // namespace
}  // namespace entrollm
