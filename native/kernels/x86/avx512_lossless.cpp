// Lossless products of AVX-512. Products in float32 keep activations whole, and cost as much as
// those of VDPBF16PS with activations in two parts.
#include <immintrin.h>

#include "kernels/generic/lossless_kernels_of.hpp"

namespace entrollm {
namespace {

struct LosslessLanes {
  static constexpr std::size_t kFloats = 16;
  static constexpr std::size_t kMostVectors = 8;
  using Floats = __m512;

  [[gnu::always_inline]] static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  [[gnu::always_inline]] static inline Floats add_product(Floats sum, Floats a, Floats b) {
    return _mm512_fmadd_ps(a, b, sum);
  }

  template <WordFormat Format>
  [[gnu::always_inline]] static inline void weights(const std::uint8_t* high,
                                                    const std::uint8_t* low, Floats (&out)[4]) {
    const __m512i h = _mm512_loadu_si512(high);
    const __m512i l = _mm512_loadu_si512(low);
    words<Format>(_mm512_unpacklo_epi8(l, h), out[0], out[1]);
    words<Format>(_mm512_unpackhi_epi8(l, h), out[2], out[3]);
  }

 private:
  template <WordFormat Format>
  [[gnu::always_inline]] static inline void words(__m512i rotated, Floats& first, Floats& second) {
    const __m512i word = _mm512_shrdi_epi16(rotated, rotated, 1);
    if constexpr (Format == WordFormat::kBfloat16) {
      first = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
      second = _mm512_castsi512_ps(
          _mm512_and_si512(word, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    } else {
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      const __m512i sorted = _mm512_permutexvar_epi64(order, word);
      first = _mm512_cvtph_ps(_mm512_castsi512_si256(sorted));
      second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(sorted, 1));
    }
  }
};

}  // namespace

const LosslessKernels kAvx512LosslessKernels = lossless_kernels_of<LosslessLanes>();

}  // namespace entrollm
