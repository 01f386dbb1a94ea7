#include "kernels/arm/neon_dot.hpp"

#include <arm_neon.h>

#include "kernels/generic/dot_kernels_of.hpp"

namespace entrollm {
namespace {

// SDOT takes signed bytes: weights are multiplied as w - 128, and 128 times the sum of the
// activations is added.
struct SdotProducts {
  static constexpr std::size_t kPartBytes = 16;

  static int8x16_t load(const std::uint8_t* weights) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights), vdupq_n_u8(0x80)));
  }

  // Two sums for each digit, so that products need not wait for each other.
  template <std::size_t Columns>
  struct Sums {
    static constexpr std::size_t kStep = kVector;
    int32x4_t high[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    int32x4_t low[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};

    template <std::size_t Part>
    void add(int8x16_t weights, const Digits& x, std::size_t at) {
      high[Part % 2] = vdotq_s32(high[Part % 2], weights, vld1q_s8(x.high + at));
      low[Part % 2] = vdotq_s32(low[Part % 2], weights, vld1q_s8(x.low + at));
    }

    std::int64_t total(const Digits& x, std::size_t count) const {
      const std::int64_t sum = x.sums[count / kVector] - x.sums[0];
      return 256 * std::int64_t{vaddvq_s32(vaddq_s32(high[0], high[1]))} +
             vaddvq_s32(vaddq_s32(low[0], low[1])) + 128 * sum;
    }
  };
};

}  // namespace

std::int64_t neon_sdot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  return dot<SdotProducts>(weights, x, count);
}

void neon_sdot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count,
                    std::int64_t* out) {
  dot_tile<SdotProducts>(weights, x, count, out);
}

}  // namespace entrollm
