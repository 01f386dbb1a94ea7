// Sixteen sums of products of integers, in the vectors of the instruction set that the including
// file is compiled for. A product takes two 16-bit integers at once, as the instructions do.
#pragma once

#include "kernels/generic/float_lanes.hpp"

namespace entrollm {
namespace {

using NativeIntegers = std::int32_t __attribute__((vector_size(kNative * sizeof(float))));

struct IntegerLanes {
  NativeIntegers part[Lanes::kParts];
};

// Sixteen pairs of integers, and a pair to multiply each of them by.
#if defined(__AVX2__)
struct PairLanes {
  NativeIntegers part[Lanes::kParts];  // two integers of 16 bits in each element
};
using PairFactor = NativeIntegers;
#elif defined(__aarch64__)
struct PairLanes {
  int16x8_t firsts[2], seconds[2];
};
using PairFactor = int16x4_t;
#else
struct PairLanes {
  NativeIntegers firsts[Lanes::kParts], seconds[Lanes::kParts];
};
struct PairFactor {
  std::int32_t first, second;
};
#endif

// The pairs (firsts[i], seconds[i]).
inline PairLanes load_pairs(const std::int8_t* firsts, const std::int8_t* seconds) {
#if defined(__AVX2__)
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(firsts));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(seconds));
  const __m128i low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
#if defined(__AVX512F__)
  return {{(NativeIntegers)_mm512_cvtepi8_epi16(_mm256_set_m128i(high, low))}};
#else
  return {{(NativeIntegers)_mm256_cvtepi8_epi16(low), (NativeIntegers)_mm256_cvtepi8_epi16(high)}};
#endif
#elif defined(__aarch64__)
  const int8x16_t a = vld1q_s8(firsts), b = vld1q_s8(seconds);
  return {{vmovl_s8(vget_low_s8(a)), vmovl_high_s8(a)},
          {vmovl_s8(vget_low_s8(b)), vmovl_high_s8(b)}};
#else
  PairLanes pairs;
  for (std::size_t i = 0; i < kLanes; ++i) {
    pairs.firsts[i / kNative][i % kNative] = firsts[i];
    pairs.seconds[i / kNative][i % kNative] = seconds[i];
  }
  return pairs;
#endif
}

// The first `count` pairs, at most kLanes; the others are 0.
inline PairLanes load_some_pairs(const std::int8_t* firsts, const std::int8_t* seconds,
                                 std::size_t count) {
  std::int8_t some[2][kLanes] = {};
  std::memcpy(some[0], firsts, count);
  std::memcpy(some[1], seconds, count);
  return load_pairs(some[0], some[1]);
}

inline PairFactor load_factor(const std::int16_t* pair) {
#if defined(__AVX2__) || defined(__aarch64__)
  std::int32_t both;
  std::memcpy(&both, pair, sizeof both);
#endif
#if defined(__AVX512F__)
  return (NativeIntegers)_mm512_set1_epi32(both);
#elif defined(__AVX2__)
  return (NativeIntegers)_mm256_set1_epi32(both);
#elif defined(__aarch64__)
  return vreinterpret_s16_s32(vdup_n_s32(both));
#else
  return {pair[0], pair[1]};
#endif
}

// sums + factor * pairs.
inline IntegerLanes add_product(const IntegerLanes& sums, const PairFactor& factor,
                                const PairLanes& pairs) {
  IntegerLanes result;
#if defined(__AVX512F__)
  result.part[0] = (NativeIntegers)_mm512_dpwssd_epi32((__m512i)sums.part[0],
                                                       (__m512i)pairs.part[0], (__m512i)factor);
#elif defined(__AVX2__)
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    result.part[i] =
        sums.part[i] + (NativeIntegers)_mm256_madd_epi16((__m256i)pairs.part[i], (__m256i)factor);
  }
#elif defined(__aarch64__)
  for (std::size_t i = 0; i < 2; ++i) {
    const int16x8_t a = pairs.firsts[i], b = pairs.seconds[i];
    const int32x4_t low = vmlal_lane_s16((int32x4_t)sums.part[2 * i], vget_low_s16(a), factor, 0);
    const int32x4_t high = vmlal_high_lane_s16((int32x4_t)sums.part[2 * i + 1], a, factor, 0);
    result.part[2 * i] = (NativeIntegers)vmlal_lane_s16(low, vget_low_s16(b), factor, 1);
    result.part[2 * i + 1] = (NativeIntegers)vmlal_high_lane_s16(high, b, factor, 1);
  }
#else
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    result.part[i] =
        sums.part[i] + factor.first * pairs.firsts[i] + factor.second * pairs.seconds[i];
  }
#endif
  return result;
}

inline Lanes to_floats(const IntegerLanes& integers) {
  Lanes floats;
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    floats.part[i] = __builtin_convertvector(integers.part[i], NativeFloats);
  }
  return floats;
}

// A number has its integer, ties to even, in the lowest 16 bits of its sum with this.
inline constexpr float kIntegerRounder = 12582912.0f;

// Rounds a number of at most 15 bits and a sign.
inline std::int16_t rounded(float x) {
  return static_cast<std::int16_t>(std::bit_cast<std::int32_t>(x + kIntegerRounder));
}

inline void store_rounded(std::int16_t* p, const Lanes& v) {
  using Shorts = std::int16_t __attribute__((vector_size(kNative * sizeof(std::int16_t))));
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    const NativeIntegers sums = (NativeIntegers)(v.part[i] + kIntegerRounder);
    const Shorts shorts = __builtin_convertvector(sums, Shorts);
    std::memcpy(p + i * kNative, &shorts, sizeof shorts);
  }
}

}  // namespace
}  // namespace entrollm
