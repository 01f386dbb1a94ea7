// Products with group scales of ARMv8.0: SMLAL of 16-bit symbols of even and of odd columns with
// whole activations.
#include "kernels/arm/grouped_neon.hpp"
#include "kernels/generic/grouped_product.hpp"

namespace entrollm {
namespace {

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 2;
  static constexpr bool kTakesWhole = true;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    // Of two columns and two rows each: rows 0 and 1, rows 2 and 3.
    int32x4_t first = vdupq_n_s32(0);
    int32x4_t second = vdupq_n_s32(0);

    [[gnu::always_inline]] inline void add(uint8x16_t symbols, const std::int8_t* x) {
      const uint16x8_t pairs = vreinterpretq_u16_u8(symbols);
      add_half(vandq_u16(pairs, vdupq_n_u16(255)), x);
      add_half(vshrq_n_u16(pairs, 8), x + kStepColumns);
    }
    [[gnu::always_inline]] inline float32x4_t floats() const {
      return vcvtq_f32_s32(vpaddq_s32(first, second));
    }

   private:
    [[gnu::always_inline]] inline void add_half(uint16x8_t symbols, const std::int8_t* x) {
      std::int32_t two;
      __builtin_memcpy(&two, x, sizeof two);
      const int16x8_t weights = vreinterpretq_s16_u16(symbols);
      const int16x8_t activations = vreinterpretq_s16_s32(vdupq_n_s32(two));
      first = vmlal_s16(first, vget_low_s16(weights), vget_low_s16(activations));
      second = vmlal_high_s16(second, weights, activations);
    }
  };
};

}  // namespace

const GroupedKernels kNeonGroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
