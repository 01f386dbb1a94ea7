// Products with group scales of AVX2. VPMADDWD multiplies symbols of even and of odd columns with
// whole activations, which is one multiplication a digit less than VPMADDUBSW takes.
#include "kernels/generic/grouped_product.hpp"
#include "kernels/x86/grouped_avx2.hpp"

namespace entrollm {
namespace {

// Activations of even columns take the place of high digits, and those of odd columns that of low
// ones.
void reorder(std::int8_t* digits, std::size_t chunks, std::size_t vectors) {
  const auto store = [](std::int8_t* out, __m256i high, __m256i low) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_add_epi16(high, _mm256_srai_epi16(low, 8)));
  };
  const std::int8_t* end = digits + chunks * vectors * 2 * kVector;
  for (; digits < end; digits += 2 * kVector) {
    for (std::size_t at = 0; at < kVector; at += FlatLanes::kLanes) {
      const __m256i high = load_digits(digits + at), low = load_digits(digits + kVector + at);
      store(digits + at, _mm256_slli_epi16(high, 8), _mm256_slli_epi16(low, 8));
      store(digits + kVector + at, _mm256_andnot_si256(_mm256_set1_epi16(255), high), low);
    }
  }
}

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 4;
  static constexpr ReorderDigits kReorder = reorder;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    __m256i total = _mm256_setzero_si256();

    [[gnu::always_inline]] inline void add(__m256i symbols, const std::int8_t* even,
                                           const std::int8_t* odd) {
      const __m256i evens = _mm256_and_si256(symbols, _mm256_set1_epi16(255));
      const __m256i odds = _mm256_srli_epi16(symbols, 8);
      total = _mm256_add_epi32(total, _mm256_madd_epi16(evens, load_digits(even)));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(odds, load_digits(odd)));
    }
    [[gnu::always_inline]] inline __m256 floats() const { return _mm256_cvtepi32_ps(total); }
  };
};

}  // namespace

const GroupedKernels kAvx2GroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
