// Group scales in registers of 4 floats. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include "kernels/arm/flat_neon.hpp"
#include "kernels/generic/group_terms.hpp"

namespace entrollm {
namespace {

struct GroupedFloats {
  using Lanes = FlatLanes;
  using Floats = float32x4_t;

  [[gnu::always_inline]] static inline float32x4_t load(const float* p) { return vld1q_f32(p); }
  [[gnu::always_inline]] static inline void store(float* p, float32x4_t x) { vst1q_f32(p, x); }
  [[gnu::always_inline]] static inline float32x4_t splat(float x) { return vdupq_n_f32(x); }
  [[gnu::always_inline]] static inline float32x4_t fma(float32x4_t a, float32x4_t b,
                                                       float32x4_t c) {
    return vfmaq_f32(c, a, b);
  }

  static void transpose(const float* rows, std::size_t groups, float* out) {
    std::size_t group = 0;
    for (; group + 4 <= groups; group += 4) {
      for (std::size_t row = 0; row < kGroupedRows; row += 4) {
        float32x4x4_t four;
        for (std::size_t i = 0; i < 4; ++i) four.val[i] = load(rows + (row + i) * groups + group);
        const float32x4x2_t low = vzipq_f32(four.val[0], four.val[2]);
        const float32x4x2_t high = vzipq_f32(four.val[1], four.val[3]);
        for (std::size_t i = 0; i < 2; ++i) {
          const float32x4x2_t both = vzipq_f32(low.val[i], high.val[i]);
          for (std::size_t k = 0; k < 2; ++k) {
            store(out + (group + 2 * i + k) * kGroupedRows + row, both.val[k]);
          }
        }
      }
    }
    transpose_groups(rows, group, groups, out);
  }

  static void widen_halves(const std::uint16_t* halves, std::size_t count, float* out) {
    std::size_t i = 0;
    for (; i + 4 <= count; i += 4) {
      vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    }
    for (; i < count; ++i) {
      out[i] = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(halves[i]))), 0);
    }
  }
};

}  // namespace
}  // namespace entrollm
