// Products with group scales of AVX2: VPMADDUBSW multiplies, VPMADDWD widens and weighs the digits.
#include "kernels/generic/grouped_product.hpp"
#include "kernels/x86/grouped_avx2.hpp"

namespace entrollm {
namespace {

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 4;

  template <int Bits>
  struct Sums {
    __m256i total = _mm256_setzero_si256();

    // A pair of products fits 16 bits below 8 bits: 2 * 127 * 128 < 2^15. Bytes are cut in two.
    [[gnu::always_inline]] inline void add(__m256i fields, const std::int8_t* high,
                                           const std::int8_t* low) {
      if constexpr (Bits == 8) {
        const __m256i nibble = _mm256_set1_epi8(15);
        add_pairs<1>(_mm256_and_si256(fields, nibble), high, low);
        add_pairs<16>(_mm256_and_si256(_mm256_srli_epi16(fields, 4), nibble), high, low);
      } else {
        add_pairs<1>(fields, high, low);
      }
    }
    [[gnu::always_inline]] inline __m256 floats() const { return _mm256_cvtepi32_ps(total); }

   private:
    template <int Weight>
    [[gnu::always_inline]] inline void add_pairs(__m256i fields, const std::int8_t* high,
                                                 const std::int8_t* low) {
      const __m256i highs = _mm256_maddubs_epi16(fields, load_digits(high));
      const __m256i lows = _mm256_maddubs_epi16(fields, load_digits(low));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(lows, _mm256_set1_epi16(Weight)));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(highs, _mm256_set1_epi16(256 * Weight)));
    }
  };
};

}  // namespace

const GroupedKernels kAvx2GroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
