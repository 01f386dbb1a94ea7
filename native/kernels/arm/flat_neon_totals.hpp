// What products of flat rows in registers of 16 bytes share. Internal linkage, as in
// generic/flat_pack.hpp.
#pragma once

#include "kernels/arm/flat_neon.hpp"

namespace entrollm {
namespace {

struct FlatTotals {
  using Lanes = FlatLanes;
  using Sums = int32x4_t;
  // At 3 bits, a loop over chunks takes a tenth of all instructions.
  static constexpr std::size_t unroll(int bits) { return bits == 3 ? 2 : 1; }

  [[gnu::always_inline]] static inline uint8x16_t load(const std::int8_t* digits) {
    return vreinterpretq_u8_s8(vld1q_s8(digits));
  }

  [[gnu::always_inline]] static inline void total(int32x4_t a, int32x4_t b, int32x4_t c,
                                                  int32x4_t d, std::int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }
};

}  // namespace
}  // namespace entrollm
