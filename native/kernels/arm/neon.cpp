// The kernels of ARMv8.0 (Cortex-A57, A72) and, in further tables, those with the dot product of
// ARMv8.2 (Cortex-A76) and with the products of matrices of ARMv8.6 (Apple M2, Neoverse V1).
#include "kernels/arm/neon_dot.hpp"
#include "kernels/arm/neon_i8mm.hpp"
#include "kernels/arm/neon_vectors.hpp"
#include "kernels/generic/kernels_of.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

// There is no product of bytes: weights and activations are multiplied in 16 bits.
struct NeonProducts {
  static constexpr std::size_t kPartBytes = 16;

  struct Weights {
    int16x8_t first;
    int16x8_t second;
  };
  static Weights load(const std::uint8_t* weights) {
    const uint8x16_t bytes = vld1q_u8(weights);
    return {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))),
            vreinterpretq_s16_u16(vmovl_high_u8(bytes))};
  }

  // 4096 weights add 256 products to each of 16 lanes: below 256 * 255 * 32768 < 2^31.
  template <std::size_t Columns>
  struct Sums {
    static constexpr std::size_t kStep = kVector;
    int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};

    template <std::size_t Part>
    void add(const Weights& weights, const Digits& x, std::size_t at) {
      const int16x8_t x_first = vld1q_s16(x.whole + at);
      const int16x8_t x_second = vld1q_s16(x.whole + at + 8);
      sum[0] = vmlal_s16(sum[0], vget_low_s16(weights.first), vget_low_s16(x_first));
      sum[1] = vmlal_high_s16(sum[1], weights.first, x_first);
      sum[2] = vmlal_s16(sum[2], vget_low_s16(weights.second), vget_low_s16(x_second));
      sum[3] = vmlal_high_s16(sum[3], weights.second, x_second);
    }

    std::int64_t total(const Digits&, std::size_t) const {
      return vaddlvq_s32(sum[0]) + vaddlvq_s32(sum[1]) + vaddlvq_s32(sum[2]) + vaddlvq_s32(sum[3]);
    }
  };
};

constexpr Kernels kTable = [] {
  Kernels kernels = kernels_of<NeonVectors, NeonProducts>("neon");
  kernels.flat = &kNeonFlatKernels;
  kernels.lossless = &kNeonLosslessKernels;
  kernels.grouped = &kNeonGroupedKernels;
  return kernels;
}();

constexpr Kernels kDotTable = [] {
  Kernels kernels = kTable;
  kernels.name = "neon-dot";
  kernels.flat = &kNeonDotFlatKernels;
  kernels.lossless = &kNeonLosslessKernels;
  kernels.grouped = &kNeonDotGroupedKernels;
  kernels.dot = neon_sdot;
  kernels.dot_tile = neon_sdot_tile;
  return kernels;
}();

}  // namespace

constinit const Kernels kNeonKernels = kTable;

constinit const Kernels kNeonDotKernels = kDotTable;

constinit const Kernels kNeonI8mmKernels = [] {
  Kernels kernels = kDotTable;
  kernels.name = "neon-i8mm";
  kernels.dot_tile_rows = neon_i8mm_dot_tile_rows;
  kernels.dot_rows = kI8mmRows;
  return kernels;
}();

}  // namespace entrollm
