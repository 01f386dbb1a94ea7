// Lossless products of AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels/generic/lossless_kernels_of.hpp"

namespace entrollm {
namespace {

struct LosslessLanes {
  static constexpr std::size_t kFloats = 8;
  static constexpr std::size_t kMostVectors = 2;
  static constexpr std::size_t kPanelVectors = 2;
  using Floats = __m256;

  [[gnu::always_inline]] static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  [[gnu::always_inline]] static inline Floats add(Floats a, Floats b) {
    return _mm256_add_ps(a, b);
  }
  [[gnu::always_inline]] static inline Floats add_product(Floats sum, Floats a, Floats b) {
    return _mm256_fmadd_ps(a, b, sum);
  }

  template <WordFormat Format>
  [[gnu::always_inline]] static inline void weights(const std::uint8_t* high,
                                                    const std::uint8_t* low, Floats (&out)[4]) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
    const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
    words<Format>(_mm256_unpacklo_epi8(l, h), out[0], out[1]);
    words<Format>(_mm256_unpackhi_epi8(l, h), out[2], out[3]);
  }

 private:
  template <WordFormat Format>
  [[gnu::always_inline]] static inline void words(__m256i rotated, Floats& first, Floats& second) {
    const __m256i word =
        _mm256_or_si256(_mm256_srli_epi16(rotated, 1), _mm256_slli_epi16(rotated, 15));
    if constexpr (Format == WordFormat::kBfloat16) {
      first = _mm256_castsi256_ps(_mm256_slli_epi32(word, 16));
      second = _mm256_castsi256_ps(
          _mm256_and_si256(word, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    } else {
      const __m256i sorted = _mm256_permute4x64_epi64(word, 0b11011000);
      first = _mm256_cvtph_ps(_mm256_castsi256_si128(sorted));
      second = _mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1));
    }
  }
};

}  // namespace

const LosslessKernels kAvx2LosslessKernels = lossless_kernels_of<LosslessLanes>();

}  // namespace entrollm
