// Products with group scales of AVX-512 with VNNI. VPDPWSSD takes symbols of even and of odd
// columns with whole activations: as many multiplications as VPDPBUSD with two digits, but no sums
// to join.
#include "kernels/generic/grouped_product.hpp"
#include "kernels/x86/flat_avx512.hpp"
#include "kernels/x86/grouped_lanes.hpp"

namespace entrollm {
namespace {

struct GroupedLanes {
  using Lanes = FlatLanes;
  using Floats = __m512;
  static constexpr std::size_t kMostVectors = 8;
  static constexpr bool kTakesWhole = true;

  // Few vectors have two sums each, since an addition takes longer than it takes to start the next.
  template <int Bits, std::size_t Vectors>
  struct Sums {
    static constexpr std::size_t kSums = Vectors < 4 ? 2 : 1;
    __m512i sums[kSums] = {};

    [[gnu::always_inline]] inline void add(__m512i symbols, const std::int8_t* x) {
      const __m512i evens = _mm512_and_si512(symbols, _mm512_set1_epi16(255));
      const __m512i odds = _mm512_srli_epi16(symbols, 8);
      sums[0] = _mm512_dpwssd_epi32(sums[0], evens, splat_four(x));
      sums[kSums - 1] = _mm512_dpwssd_epi32(sums[kSums - 1], odds, splat_four(x + kStepColumns));
    }
    [[gnu::always_inline]] inline __m512 floats() const {
      return _mm512_cvtepi32_ps(kSums == 1 ? sums[0] : _mm512_add_epi32(sums[0], sums[kSums - 1]));
    }

   private:
    [[gnu::always_inline]] static inline __m512i splat_four(const std::int8_t* x) {
      return _mm512_set1_epi32(load_four(x));
    }
  };

  [[gnu::always_inline]] static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
  [[gnu::always_inline]] static inline __m512 splat(float x) { return _mm512_set1_ps(x); }
  [[gnu::always_inline]] static inline __m512 fma(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
  }

  static void transpose(const float* rows, std::size_t groups, float* out) {
    transpose_tile(rows, groups, out);
  }

  static void widen_halves(const std::uint16_t* halves, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; i += 16) {
      const auto mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
      const __m256i some = _mm256_maskz_loadu_epi16(mask, halves + i);
      _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(some));
    }
  }
};

}  // namespace

const GroupedKernels kAvx512GroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
