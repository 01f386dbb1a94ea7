// Products with group scales of AVX-512 with VNNI. VPDPBUSD takes the two digits of activations
// apart, and VPDPWSSD symbols of even and of odd columns: as many multiplications, without the
// joining of two sums for each group, but with symbols to be parted for all vectors. That pays from
// kWholeVectors vectors on.
#include "kernels/generic/grouped_product.hpp"
#include "kernels/x86/flat_avx512.hpp"
#include "kernels/x86/grouped_lanes.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kWholeVectors = 4;

// Activations of even columns take the place of high digits, and those of odd columns that of low
// ones.
void reorder(std::int8_t* digits, std::size_t chunks, std::size_t vectors) {
  if (vectors < kWholeVectors) return;
  const std::int8_t* end = digits + chunks * vectors * 2 * kVector;
  for (; digits < end; digits += 2 * kVector) {
    const __m512i high = _mm512_loadu_si512(digits), low = _mm512_loadu_si512(digits + kVector);
    const __m512i even_low = _mm512_srai_epi16(_mm512_slli_epi16(low, 8), 8);
    const __m512i odd_high = _mm512_andnot_si512(_mm512_set1_epi16(255), high);
    _mm512_storeu_si512(digits, _mm512_add_epi16(_mm512_slli_epi16(high, 8), even_low));
    _mm512_storeu_si512(digits + kVector, _mm512_add_epi16(odd_high, _mm512_srai_epi16(low, 8)));
  }
}

struct GroupedLanes {
  using Lanes = FlatLanes;
  using Floats = __m512;
  static constexpr std::size_t kMostVectors = 8;
  static constexpr ReorderDigits kReorder = reorder;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    __m512i highs = _mm512_setzero_si512();
    __m512i lows = _mm512_setzero_si512();

    [[gnu::always_inline]] inline void add(__m512i fields, const std::int8_t* high,
                                           const std::int8_t* low) {
      highs = _mm512_dpbusd_epi32(highs, fields, _mm512_loadu_si512(high));
      lows = _mm512_dpbusd_epi32(lows, fields, _mm512_loadu_si512(low));
    }
    [[gnu::always_inline]] inline __m512 floats() const {
      return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(highs, 8), lows));
    }
  };

  template <int Bits, std::size_t Vectors>
    requires(Vectors >= kWholeVectors)
  struct Sums<Bits, Vectors> {
    __m512i total = _mm512_setzero_si512();

    [[gnu::always_inline]] inline void add(__m512i symbols, const std::int8_t* even,
                                           const std::int8_t* odd) {
      const __m512i evens = _mm512_and_si512(symbols, _mm512_set1_epi16(255));
      const __m512i odds = _mm512_srli_epi16(symbols, 8);
      total = _mm512_dpwssd_epi32(total, evens, _mm512_loadu_si512(even));
      total = _mm512_dpwssd_epi32(total, odds, _mm512_loadu_si512(odd));
    }
    [[gnu::always_inline]] inline __m512 floats() const { return _mm512_cvtepi32_ps(total); }
  };

  [[gnu::always_inline]] static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
  [[gnu::always_inline]] static inline __m512 splat(float x) { return _mm512_set1_ps(x); }
  [[gnu::always_inline]] static inline __m512 fma(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
  }

  static void add_lanes(const float* lanes, std::size_t stride, float* totals) {
    add_lanes_of_eight(lanes, stride, totals);
  }

  template <std::size_t Size>
  [[gnu::always_inline]] static inline __m512 spread(const float* scales) {
    if constexpr (Size == 32) {
      double two;
      __builtin_memcpy(&two, scales, sizeof two);
      const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
      return _mm512_permutexvar_ps(order, _mm512_castpd_ps(_mm512_set1_pd(two)));
    } else if constexpr (Size == 16) {
      const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      return _mm512_permutexvar_ps(order, _mm512_broadcast_f32x4(_mm_loadu_ps(scales)));
    } else {
      static_assert(Size == 8);
      const __m512i order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      return _mm512_permutexvar_ps(order, _mm512_broadcast_f32x8(_mm256_loadu_ps(scales)));
    }
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
