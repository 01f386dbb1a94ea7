// Products with group scales of ARMv8.0. Fields of at most 7 bits are signed bytes as well; bytes
// are cut in two.
#include "kernels/arm/grouped_neon.hpp"
#include "kernels/generic/grouped_product.hpp"

namespace entrollm {
namespace {

struct GroupedLanes : GroupedFloats {
  static constexpr std::size_t kMostVectors = 4;
  static constexpr ReorderDigits kReorder = nullptr;

  template <int Bits, std::size_t Vectors>
  struct Sums {
    int32x4_t total = vdupq_n_s32(0);

    [[gnu::always_inline]] inline void add(uint8x16_t fields, const std::int8_t* high,
                                           const std::int8_t* low) {
      if constexpr (Bits == 8) {
        add_digits<0>(vandq_u8(fields, vdupq_n_u8(15)), high, low);
        add_digits<4>(vshrq_n_u8(fields, 4), high, low);
      } else {
        add_digits<0>(fields, high, low);
      }
    }
    [[gnu::always_inline]] inline float32x4_t floats() const { return vcvtq_f32_s32(total); }

   private:
    // Sums of four columns of the products with one digit.
    [[gnu::always_inline]] static inline int32x4_t fours(int8x16_t weights,
                                                         const std::int8_t* digits) {
      const int8x16_t x = vld1q_s8(digits);
      const int16x8_t first = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
      const int16x8_t second = vmull_high_s8(weights, x);
      return vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second));
    }

    template <int Shift>
    [[gnu::always_inline]] inline void add_digits(uint8x16_t fields, const std::int8_t* high,
                                                  const std::int8_t* low) {
      const int8x16_t weights = vreinterpretq_s8_u8(fields);
      const int32x4_t both = vaddq_s32(vshlq_n_s32(fours(weights, high), 8), fours(weights, low));
      total = vaddq_s32(total, Shift == 0 ? both : vshlq_n_s32(both, Shift));
    }
  };
};

}  // namespace

const GroupedKernels kNeonGroupedKernels = make_grouped_kernels<GroupedLanes>();

}  // namespace entrollm
