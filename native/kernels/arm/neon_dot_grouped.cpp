// Products with group scales of the ARMv8.2 dot product.
#include "kernels/arm/grouped_neon.hpp"
#include "kernels/generic/grouped_product.hpp"

namespace entrollm {
namespace {

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 2;
  static constexpr bool kTakesWhole = false;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    int32x4_t highs = vdupq_n_s32(0);
    int32x4_t lows = vdupq_n_s32(0);

    // Signed products: the upper nibbles of bytes have sums of their own weight.
    [[gnu::always_inline]] inline void add(uint8x16_t fields, const std::int8_t* x) {
      const int8x16_t x_high = splat_four(x), x_low = splat_four(x + kStepColumns);
      if constexpr (Bits == 8) {
        const int8x16_t upper = vreinterpretq_s8_u8(vshrq_n_u8(fields, 4));
        const int32x4_t zero = vdupq_n_s32(0);
        highs = vaddq_s32(highs, vshlq_n_s32(vdotq_s32(zero, upper, x_high), 4));
        lows = vaddq_s32(lows, vshlq_n_s32(vdotq_s32(zero, upper, x_low), 4));
        fields = vandq_u8(fields, vdupq_n_u8(15));
      }
      const int8x16_t weights = vreinterpretq_s8_u8(fields);
      highs = vdotq_s32(highs, weights, x_high);
      lows = vdotq_s32(lows, weights, x_low);
    }
    [[gnu::always_inline]] inline float32x4_t floats() const {
      return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(highs, 8), lows));
    }

   private:
    [[gnu::always_inline]] static inline int8x16_t splat_four(const std::int8_t* x) {
      std::int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
  };
};

}  // namespace

const GroupedKernels kNeonDotGroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
