// Flat products of AVX2: VPMADDUBSW sums pairs in 16 bits, which are widened before they overflow.
#include "kernels/generic/flat_product.hpp"
#include "kernels/x86/flat_avx2.hpp"
#include "kernels/x86/flat_avx2_totals.hpp"

namespace entrollm {
namespace {

struct FlatProducts : FlatTotals {
  static constexpr std::size_t unroll(int) { return 4; }
  static constexpr std::size_t rows(int, std::size_t vectors) { return vectors == 1 ? 2 : 1; }

  template <int Bits>
  struct Accumulator {
    // A pair of products is at most 2 * (2^Bits - 1) * 128.
    static constexpr std::size_t kMost = 32768 / (256 * ((1 << Bits) - 1));

    __m256i narrow = _mm256_setzero_si256();
    __m256i wide = _mm256_setzero_si256();

    [[gnu::always_inline]] inline void add(__m256i fields, __m256i digits) {
      narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(fields, digits));
      asm("" : "+x"(narrow));  // compilers that reorder additions run out of registers
    }
    [[gnu::always_inline]] inline void widen() {
      wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
      narrow = _mm256_setzero_si256();
    }
    [[gnu::always_inline]] inline __m256i sums() const { return wide; }
  };
};

}  // namespace

const FlatKernels kAvx2FlatKernels = make_flat_kernels<FlatProducts>();

}  // namespace entrollm
