// Flat products of ARMv8.0: SMLAL sums products of bytes in 16 bits, which are widened before they
// overflow.
#include "kernels/arm/flat_neon.hpp"
#include "kernels/arm/flat_neon_totals.hpp"
#include "kernels/generic/flat_product.hpp"

namespace entrollm {
namespace {

struct FlatProducts : FlatTotals {
  // Widths with a part of single bits need more registers a row.
  static constexpr std::size_t rows(int bits, std::size_t vectors) {
    return vectors == 1 && bits % 2 == 0 ? 4 : vectors <= 2 ? 2 : 1;
  }

  template <int Bits>
  struct Accumulator {
    // Two products of at most (2^Bits - 1) * 128 a lane and call.
    static constexpr std::size_t kMost = 32768 / (256 * ((1 << Bits) - 1));

    int16x8_t narrow = vdupq_n_s16(0);
    int32x4_t wide = vdupq_n_s32(0);

    [[gnu::always_inline]] inline void add(uint8x16_t fields, uint8x16_t digits) {
      const int8x16_t w = vreinterpretq_s8_u8(fields);
      const int8x16_t x = vreinterpretq_s8_u8(digits);
      narrow = vmlal_s8(narrow, vget_low_s8(w), vget_low_s8(x));
      narrow = vmlal_high_s8(narrow, w, x);
    }
    [[gnu::always_inline]] inline void widen() {
      wide = vpadalq_s16(wide, narrow);
      narrow = vdupq_n_s16(0);
    }
    [[gnu::always_inline]] inline int32x4_t sums() const { return wide; }
  };
};

}  // namespace

const FlatKernels kNeonFlatKernels = make_flat_kernels<FlatProducts>();

}  // namespace entrollm
