// Products with group scales of AVX2 with AVX-VNNI.
#include "kernels/generic/grouped_product.hpp"
#include "kernels/x86/grouped_avx2.hpp"

namespace entrollm {
namespace {

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 4;
  static constexpr bool kTakesWhole = false;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    __m256i highs = _mm256_setzero_si256();
    __m256i lows = _mm256_setzero_si256();

    [[gnu::always_inline]] inline void add(__m256i symbols, const std::int8_t* x) {
      highs = _mm256_dpbusd_avx_epi32(highs, symbols, splat_four(x));
      lows = _mm256_dpbusd_avx_epi32(lows, symbols, splat_four(x + kStepColumns));
    }
    [[gnu::always_inline]] inline __m256 floats() const {
      return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(highs, 8), lows));
    }
  };
};

}  // namespace

const GroupedKernels kAvx2VnniGroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
