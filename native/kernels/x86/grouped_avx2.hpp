// Group scales in registers of 8 floats. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include "kernels/x86/flat_avx2.hpp"
#include "kernels/x86/grouped_lanes.hpp"

namespace entrollm {
namespace {

struct GroupedFloats {
  using Lanes = FlatLanes;
  using Floats = __m256;

  [[gnu::always_inline]] static inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
  [[gnu::always_inline]] static inline __m256 splat(float x) { return _mm256_set1_ps(x); }
  [[gnu::always_inline]] static inline __m256 fma(__m256 a, __m256 b, __m256 c) {
    return _mm256_fmadd_ps(a, b, c);
  }

  static void transpose(const float* rows, std::size_t groups, float* out) {
    transpose_tile(rows, groups, out);
  }

  static void widen_halves(const std::uint16_t* halves, std::size_t count, float* out) {
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      store(out + i,
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
    for (; i < count; ++i) out[i] = _cvtsh_ss(halves[i]);
  }
};

[[gnu::always_inline]] inline __m256i splat_four(const std::int8_t* x) {
  return _mm256_set1_epi32(load_four(x));
}

}  // namespace
}  // namespace entrollm
