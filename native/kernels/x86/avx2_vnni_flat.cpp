// Flat products of AVX2 with AVX-VNNI.
#include "kernels/generic/flat_product.hpp"
#include "kernels/x86/flat_avx2.hpp"
#include "kernels/x86/flat_avx2_totals.hpp"

namespace entrollm {
namespace {

struct FlatProducts : FlatTotals {
  static constexpr std::size_t unroll(int) { return 4; }
  static constexpr std::size_t rows(int, std::size_t vectors) {
    return vectors == 1 ? 4 : vectors == 2 ? 2 : 1;
  }

  template <int Bits>
  struct Accumulator {
    static constexpr std::size_t kMost = SIZE_MAX;

    __m256i wide = _mm256_setzero_si256();

    [[gnu::always_inline]] inline void add(__m256i fields, __m256i digits) {
      wide = _mm256_dpbusd_avx_epi32(wide, fields, digits);
    }
    [[gnu::always_inline]] inline void widen() {}
    [[gnu::always_inline]] inline __m256i sums() const { return wide; }
  };
};

}  // namespace

const FlatKernels kAvx2VnniFlatKernels = make_flat_kernels<FlatProducts>();

}  // namespace entrollm
