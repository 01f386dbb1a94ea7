// Products with group scales of AVX2. VPMADDWD multiplies symbols of even and of odd columns with
// whole activations, which is one multiplication a digit less than VPMADDUBSW takes.
#include "kernels/generic/grouped_product.hpp"
#include "kernels/x86/grouped_avx2.hpp"

namespace entrollm {
namespace {

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 4;
  static constexpr bool kTakesWhole = true;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    __m256i total = _mm256_setzero_si256();

    [[gnu::always_inline]] inline void add(__m256i symbols, const std::int8_t* x) {
      const __m256i evens = _mm256_and_si256(symbols, _mm256_set1_epi16(255));
      const __m256i odds = _mm256_srli_epi16(symbols, 8);
      total = _mm256_add_epi32(total, _mm256_madd_epi16(evens, splat_four(x)));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(odds, splat_four(x + kStepColumns)));
    }
    [[gnu::always_inline]] inline __m256 floats() const { return _mm256_cvtepi32_ps(total); }
  };
};

}  // namespace

const GroupedKernels kAvx2GroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
