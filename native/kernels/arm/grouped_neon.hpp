// Group scales in registers of 4 floats. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include "kernels/arm/flat_neon.hpp"

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

  // Each step adds the halves of what is left of rows, and puts the sums side by side.
  static void add_lanes(const float* lanes, std::size_t stride, float* totals) {
    const auto fours = [&](std::size_t row) __attribute__((always_inline)) {
      const float* at = lanes + row * stride;
      return vaddq_f32(vaddq_f32(load(at), load(at + 8)), vaddq_f32(load(at + 4), load(at + 12)));
    };
    const auto pairs = [&](std::size_t row) __attribute__((always_inline)) {
      const float64x2_t a = vreinterpretq_f64_f32(fours(row));
      const float64x2_t b = vreinterpretq_f64_f32(fours(row + 1));
      return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)),
                       vreinterpretq_f32_f64(vzip2q_f64(a, b)));
    };
    for (std::size_t row = 0; row < 8; row += 4) {
      store(totals + row, vpaddq_f32(pairs(row), pairs(row + 2)));
    }
  }

  template <std::size_t Size>
  [[gnu::always_inline]] static inline float32x4_t spread(const float* scales) {
    static_assert(Size == 8);
    return vcombine_f32(vdup_n_f32(scales[0]), vdup_n_f32(scales[1]));
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
