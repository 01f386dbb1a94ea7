// Sixteen floats, in the vectors of the instruction set that the including file is compiled for.
// Internal linkage: code for one instruction set must not be shared by the linker with code for
// another.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace entrollm {
namespace {

inline constexpr std::size_t kLanes = 16;

#if defined(__AVX512F__)
inline constexpr std::size_t kNative = 16;
#elif defined(__AVX__)
inline constexpr std::size_t kNative = 8;
#else
inline constexpr std::size_t kNative = 4;
#endif

using NativeFloats = float __attribute__((vector_size(kNative * sizeof(float))));
using NativeWords = std::uint32_t __attribute__((vector_size(kNative * sizeof(float))));

struct Lanes {
  static constexpr std::size_t kParts = kLanes / kNative;
  NativeFloats part[kParts];
};

// Applies `f` to each part of the arguments.
template <class F, class... Args>
inline Lanes each_part(F f, const Args&... args) {
  Lanes result;
  for (std::size_t i = 0; i < Lanes::kParts; ++i) result.part[i] = f(args.part[i]...);
  return result;
}

// Part by part, since GCC copies all at once by way of the stack.
inline Lanes load_lanes(const float* p) {
  Lanes v;
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    std::memcpy(&v.part[i], p + i * kNative, sizeof v.part[i]);
  }
  return v;
}

// Exact for all finite numbers. Its own formula has the sign and, moved to the exponent of a float,
// the rest.
inline float half_to_float(std::uint16_t half) {
  const float magnitude = std::bit_cast<float>((half & 0x7fffu) << 13) * 0x1p112f;
  return half & 0x8000u ? -magnitude : magnitude;
}

// Loads numbers of half precision.
inline Lanes load_lanes(const std::uint16_t* p) {
  Lanes v;
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    const std::uint16_t* from = p + i * kNative;
#if defined(__AVX512F__)
    v.part[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    v.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
    v.part[i] = (NativeFloats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    for (std::size_t lane = 0; lane < kNative; ++lane) v.part[i][lane] = half_to_float(from[lane]);
#endif
  }
  return v;
}

inline void store_lanes(float* p, const Lanes& v) {
  for (std::size_t i = 0; i < Lanes::kParts; ++i) {
    std::memcpy(p + i * kNative, &v.part[i], sizeof v.part[i]);
  }
}

// Loads the first `count` lanes, at most kLanes; the others are `rest`.
template <class T>
inline Lanes load_some(const T* p, std::size_t count, T rest) {
  T some[kLanes];
  for (T& value : some) value = rest;
  std::memcpy(some, p, count * sizeof(T));
  return load_lanes(some);
}

inline void store_some(float* p, const Lanes& v, std::size_t count) {
  float some[kLanes];
  store_lanes(some, v);
  std::memcpy(p, some, count * sizeof(float));
}

inline float first_of(const Lanes& v) {
  float lanes[kLanes];
  store_lanes(lanes, v);
  return lanes[0];
}

// The number of lanes of as many vectors as `count` elements take.
constexpr std::size_t padded(std::size_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline Lanes splat(float value) {
  Lanes v;
  for (auto& part : v.part) {
#if defined(__AVX512F__)
    part = _mm512_set1_ps(value);
#elif defined(__AVX__)
    part = _mm256_set1_ps(value);
#else
    for (std::size_t lane = 0; lane < kNative; ++lane) part[lane] = value;
#endif
  }
  return v;
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return each_part([](auto x, auto y) { return x + y; }, a, b);
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return each_part([](auto x, auto y) { return x - y; }, a, b);
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  return each_part([](auto x, auto y) { return x * y; }, a, b);
}
inline Lanes operator/(const Lanes& a, const Lanes& b) {
  return each_part([](auto x, auto y) { return x / y; }, a, b);
}

// The larger of each pair; `b` where one is NaN.
inline Lanes larger(const Lanes& a, const Lanes& b) {
  return each_part([](auto x, auto y) -> NativeFloats { return x > y ? x : y; }, a, b);
}

template <class Combine>
inline float fold(const Lanes& v, Combine combine) {
  float lanes[kLanes];
  store_lanes(lanes, v);
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

inline float sum_of(const Lanes& v) {
  return fold(v, [](float a, float b) { return a + b; });
}

// exp(x) to about two units in the last place. It is 0 below -87, where results would be denormal,
// and infinity above 88. NaN stays NaN.
inline NativeFloats exp_part(NativeFloats x) {
  constexpr float kRounder =
      12582912.0f;  // adding it rounds to an integer, which is then in the lowest bits
  const NativeFloats shifted = x * 1.44269504f + kRounder;
  const NativeFloats n = shifted - kRounder;
  const NativeFloats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  NativeFloats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Unsigned, since it overflows where x is outside the range.
  const NativeWords exponent = ((NativeWords)shifted << 23) + (127u << 23);
  const NativeFloats result = p * (NativeFloats)exponent;
  const NativeFloats low = x < -87.0f ? NativeFloats{} : result;
  return x > 88.0f ? NativeFloats{} + std::numeric_limits<float>::infinity() : low;
}

// 2^x to within 3e-6 of itself, for x below 128. It is 0 below -126.5. NaN stays NaN.
inline NativeFloats power_of_two_part(NativeFloats x) {
  constexpr float kRounder = 12582912.0f;  // as in exp_part
  const NativeFloats least = NativeFloats{} - 127.0f;
  const NativeFloats bounded = least > x ? least : x;
  const NativeFloats shifted = bounded + kRounder;
  const NativeFloats r = bounded - (shifted - kRounder);
  NativeFloats p = r * 9.57010128e-3f + 5.59178591e-2f;
  p = p * r + 2.40247443e-1f;
  p = p * r + 6.93121791e-1f;
  p = p * r + 9.99999285e-1f;
  const NativeWords exponent = ((NativeWords)shifted << 23) + (127u << 23);
  return p * (NativeFloats)exponent;
}

inline Lanes power_of_two(const Lanes& x) {
  return each_part([](auto part) { return power_of_two_part(part); }, x);
}

inline Lanes exp_of(const Lanes& x) {
  return each_part([](auto part) { return exp_part(part); }, x);
}

}  // namespace
}  // namespace entrollm
