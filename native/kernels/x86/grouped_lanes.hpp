// Totals of lanes, eight rows at a time. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <immintrin.h>

#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

// Each step adds the halves of what is left of two rows, and puts the sums side by side.
[[gnu::always_inline]] inline void add_lanes_of_eight(const float* lanes, std::size_t stride,
                                                      float* totals) {
  const auto eights = [&](std::size_t row) __attribute__((always_inline)) {
    const float* at = lanes + row * stride;
    return _mm256_add_ps(_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8));
  };
  const auto fours = [&](std::size_t row) __attribute__((always_inline)) {
    const __m256 a = eights(row), b = eights(row + 4);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto pairs = [&](std::size_t row) __attribute__((always_inline)) {
    const __m256 a = fours(row), b = fours(row + 1);
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  };
  const __m256 a = pairs(0), b = pairs(2);
  _mm256_storeu_ps(totals,
                   _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)));
}

}  // namespace
}  // namespace entrollm
