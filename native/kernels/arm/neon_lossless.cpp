// Lossless products of NEON.
#include <arm_neon.h>

#include "kernels/generic/lossless_kernels_of.hpp"

namespace entrollm {
namespace {

struct LosslessLanes {
  static constexpr std::size_t kFloats = 4;
  static constexpr std::size_t kMostVectors = 2;
  static constexpr std::size_t kPanelVectors = 4;
  using Floats = float32x4_t;

  [[gnu::always_inline]] static inline Floats load(const float* p) { return vld1q_f32(p); }
  [[gnu::always_inline]] static inline void store(float* p, Floats v) { vst1q_f32(p, v); }
  [[gnu::always_inline]] static inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  [[gnu::always_inline]] static inline Floats add_product(Floats sum, Floats a, Floats b) {
    return vfmaq_f32(sum, a, b);
  }

  template <WordFormat Format>
  [[gnu::always_inline]] static inline void weights(const std::uint8_t* high,
                                                    const std::uint8_t* low, Floats (&out)[4]) {
    const uint8x16_t h = vld1q_u8(high);
    const uint8x16_t l = vld1q_u8(low);
    words<Format>(vzip1q_u8(l, h), out[0], out[1]);
    words<Format>(vzip2q_u8(l, h), out[2], out[3]);
  }

 private:
  template <WordFormat Format>
  [[gnu::always_inline]] static inline void words(uint8x16_t bytes, Floats& first, Floats& second) {
    const uint16x8_t rotated = vreinterpretq_u16_u8(bytes);
    const uint16x8_t word = vsriq_n_u16(vshlq_n_u16(rotated, 15), rotated, 1);
    if constexpr (Format == WordFormat::kBfloat16) {
      const uint32x4_t pairs = vreinterpretq_u32_u16(word);
      first = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
      second = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    } else {
      const float16x8_t halves = vreinterpretq_f16_u16(word);
      first = vcvt_f32_f16(vget_low_f16(halves));
      second = vcvt_high_f32_f16(halves);
    }
  }
};

}  // namespace

const LosslessKernels kNeonLosslessKernels = lossless_kernels_of<LosslessLanes>();

}  // namespace entrollm
