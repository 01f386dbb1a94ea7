// Flat products of AVX-512 with VNNI.
#include "kernels/generic/flat_product.hpp"
#include "kernels/x86/flat_avx512.hpp"

namespace entrollm {
namespace {

struct FlatProducts {
  using Lanes = FlatLanes;
  using Sums = __m512i;
  static constexpr std::size_t unroll(int) { return 4; }
  static constexpr std::size_t rows(int, std::size_t vectors) { return vectors == 2 ? 4 : 2; }

  [[gnu::always_inline]] static inline __m512i load(const std::int8_t* digits) {
    __m512i bytes = _mm512_load_si512(digits);
    asm("" : "+v"(bytes));  // compilers load it again for each row
    return bytes;
  }

  [[gnu::always_inline]] static inline void total(__m512i a, __m512i b, __m512i c, __m512i d,
                                                  std::int32_t* out) {
    const __m256i pairs =
        _mm256_hadd_epi32(_mm256_hadd_epi32(fold(a), fold(b)), _mm256_hadd_epi32(fold(c), fold(d)));
    const __m128i totals =
        _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), totals);
  }

  template <int Bits>
  struct Accumulator {
    static constexpr std::size_t kMost = SIZE_MAX;

    __m512i wide = _mm512_setzero_si512();

    [[gnu::always_inline]] inline void add(__m512i fields, __m512i digits) {
      wide = _mm512_dpbusd_epi32(wide, fields, digits);
    }
    [[gnu::always_inline]] inline void widen() {}
    [[gnu::always_inline]] inline __m512i sums() const { return wide; }
  };

 private:
  [[gnu::always_inline]] static inline __m256i fold(__m512i sums) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
  }
};

}  // namespace

const FlatKernels kAvx512FlatKernels = make_flat_kernels<FlatProducts>();

}  // namespace entrollm
