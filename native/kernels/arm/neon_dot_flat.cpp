// Flat products of the ARMv8.2 dot product: fields of at most 7 bits are signed bytes as well.
#include "kernels/arm/flat_neon.hpp"
#include "kernels/arm/flat_neon_totals.hpp"
#include "kernels/generic/flat_product.hpp"

namespace entrollm {
namespace {

struct FlatProducts : FlatTotals {
  // Widths with a part of single bits need more registers a row.
  static constexpr std::size_t rows(int bits, std::size_t vectors) {
    return vectors <= 2 && bits % 2 == 0 ? 4 : 2;
  }

  template <int Bits>
  struct Accumulator {
    static constexpr std::size_t kMost = SIZE_MAX;

    int32x4_t wide = vdupq_n_s32(0);

    [[gnu::always_inline]] inline void add(uint8x16_t fields, uint8x16_t digits) {
      wide = vdotq_s32(wide, vreinterpretq_s8_u8(fields), vreinterpretq_s8_u8(digits));
    }
    [[gnu::always_inline]] inline void widen() {}
    [[gnu::always_inline]] inline int32x4_t sums() const { return wide; }
  };
};

}  // namespace

const FlatKernels kNeonDotFlatKernels = make_flat_kernels<FlatProducts>();

}  // namespace entrollm
