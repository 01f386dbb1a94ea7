#include "kernels/arm/neon_i8mm.hpp"

#include <arm_neon.h>

namespace entrollm {
namespace {

constexpr std::size_t kPairs = kI8mmRows / 2;
static_assert(kI8mmRows <= kMostDotRows);

// The first, or the second, eight bytes of two registers.
uint8x16_t first_halves(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
}
uint8x16_t second_halves(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
}

}  // namespace

// USMMLA multiplies two rows by eight columns with eight columns by two: here, two rows of weights
// and both digits of a vector. Laying the digits out that way is shared by four pairs of rows, and
// the 16 registers of sums, eight of weights and two of digits fit the 32 that there are. A lane
// adds kDotRowsColumns products: below 2048 * 255 * 128 < 2^31.
void neon_i8mm_dot_tile_rows(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                             std::size_t count, std::int64_t* out) {
  constexpr std::size_t kStep = 16;
  int32x4_t sums[kPairs][kColumnTile];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kPairs * kColumnTile; ++i) {
    sums[i / kColumnTile][i % kColumnTile] = vdupq_n_s32(0);
  }
  const std::int8_t* const highs[] = {x[0].high, x[1].high, x[2].high, x[3].high};
  const std::int8_t* const lows[] = {x[0].low, x[1].low, x[2].low, x[3].low};
  for (std::size_t at = 0; at < count; at += kStep) {
    uint8x16_t first[kPairs], second[kPairs];
#pragma GCC unroll 4
    for (std::size_t pair = 0; pair < kPairs; ++pair) {
      const std::uint8_t* rows = weights + 2 * pair * stride + at;
      const uint8x16_t upper = vld1q_u8(rows), lower = vld1q_u8(rows + stride);
      first[pair] = first_halves(upper, lower);
      second[pair] = second_halves(upper, lower);
    }
#pragma GCC unroll 4
    for (std::size_t column = 0; column < kColumnTile; ++column) {
      asm volatile("" ::: "memory");  // or compilers load all digits first, and registers run out
      const uint8x16_t high = vreinterpretq_u8_s8(vld1q_s8(highs[column] + at));
      const uint8x16_t low = vreinterpretq_u8_s8(vld1q_s8(lows[column] + at));
      const int8x16_t first_digits = vreinterpretq_s8_u8(first_halves(high, low));
      const int8x16_t second_digits = vreinterpretq_s8_u8(second_halves(high, low));
#pragma GCC unroll 4
      for (std::size_t pair = 0; pair < kPairs; ++pair) {
        sums[pair][column] = vusmmlaq_s32(sums[pair][column], first[pair], first_digits);
        sums[pair][column] = vusmmlaq_s32(sums[pair][column], second[pair], second_digits);
      }
    }
  }
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kPairs * kColumnTile; ++i) {
    const std::size_t pair = i / kColumnTile, column = i % kColumnTile;
    std::int32_t lanes[4];  // high and low digits with one row, then with the other
    vst1q_s32(lanes, sums[pair][column]);
    out[2 * pair * kColumnTile + column] = std::int64_t{256} * lanes[0] + lanes[1];
    out[(2 * pair + 1) * kColumnTile + column] = std::int64_t{256} * lanes[2] + lanes[3];
  }
}

}  // namespace entrollm
