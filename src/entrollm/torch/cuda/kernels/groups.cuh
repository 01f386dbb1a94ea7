// Matrices with group scales: integers of BITS bits in fields of fixed width, with scales in the
// types in which they are stored. docs/research/cuda.md describes the layout.
//
// A unit is 32 neighbours of a row, and a quad is four of them, whose integers are the bytes of a
// word. A unit has 4, 2 and 1 bits of every integer, as the bits of BITS say, the lowest first, in
// as many words. Integers of 8 bits are stored as they are. The compiler defines BITS, SIZE
// (columns of a group), SUPER_SIZE (of a super group, or SIZE), the types of what scales are made
// of (0 where there is none, 1 float32, 2 float16, 3 bfloat16, 4 unsigned and 5 signed bytes) as
// SCALE, ZERO, MINIMUM, SUPER_SCALE and SUPER_MINIMUM, CONSTANT_ZERO (1 where one zero is for all
// groups), and VALUES of the integers (0 themselves, 1 E4M3, 2 E5M2).
#pragma once

#include "basic.cuh"

constexpr int kUnitColumns = 32;
constexpr int kQuads = 8;
// The bits of 2^23. With an integer below 2^23 in the low bits, they are those of the sum.
constexpr u32 kLiftBits = 0x4b000000u;
constexpr float kLift = 8388608.0f;

struct Matrix {
  const u32* eights;  // words of each width; null where there is none
  const u32* fours;
  const u32* twos;
  const u32* ones;
  const void* scale;
  const void* zero;
  const void* minimum;
  const void* super_scale;
  const void* super_minimum;
  int rows;
  int columns;
  int units;         // of a row
  int groups;        // of a row
  int super_groups;  // of a row
  float constant_zero;
  float factor;  // of all weights
};

// The stored bits of a number.
template <int kNumber>
__device__ __forceinline__ u32 load_number(const void* from, long long at) {
  if constexpr (kNumber == 1) return __ldg(static_cast<const u32*>(from) + at);
  if constexpr (kNumber == 2 || kNumber == 3) return __ldg(static_cast<const u16*>(from) + at);
  if constexpr (kNumber == 4 || kNumber == 5) return __ldg(static_cast<const u8*>(from) + at);
  return 0;
}

__device__ __forceinline__ float half_value(u32 bits) {
  float value;
  asm("{\n .reg .b16 h;\n mov.b16 h, %1;\n cvt.f32.f16 %0, h;\n}"
      : "=f"(value)
      : "h"(static_cast<u16>(bits)));
  return value;
}

template <int kNumber>
__device__ __forceinline__ float number(u32 bits) {
  if constexpr (kNumber == 1) return __uint_as_float(bits);
  if constexpr (kNumber == 2) return half_value(bits);
  if constexpr (kNumber == 3) return __uint_as_float(bits << 16);
  if constexpr (kNumber == 4) return static_cast<float>(bits);
  return static_cast<float>(static_cast<signed char>(bits));
}

// What the weights of a group have in common, as it is stored.
struct Group {
  u32 scale;
  u32 zero;
  u32 minimum;
  u32 super_scale;
  u32 super_minimum;

  __device__ __forceinline__ void load(const Matrix& matrix, long long row, int group) {
    group = min(group, matrix.groups - 1);
    const long long at = row * matrix.groups + group;
    scale = load_number<SCALE>(matrix.scale, at);
    zero = load_number<ZERO>(matrix.zero, at);
    minimum = load_number<MINIMUM>(matrix.minimum, at);
    if constexpr (SUPER_SCALE != 0 || SUPER_MINIMUM != 0) {
      const long long above = row * matrix.super_groups +
                              static_cast<int>(static_cast<long long>(group) * SIZE / SUPER_SIZE);
      super_scale = load_number<SUPER_SCALE>(matrix.super_scale, above);
      super_minimum = load_number<SUPER_MINIMUM>(matrix.super_minimum, above);
    }
  }

  __device__ __forceinline__ float scale_value() const {
    const float own = number<SCALE>(scale);
    return SUPER_SCALE == 0 ? own : __fmul_rn(number<SUPER_SCALE>(super_scale), own);
  }

  __device__ __forceinline__ float minimum_value() const {
    const float own = number<MINIMUM>(minimum);
    return SUPER_MINIMUM == 0 ? own : __fmul_rn(number<SUPER_MINIMUM>(super_minimum), own);
  }

  __device__ __forceinline__ float zero_value(const Matrix& matrix) const {
    if constexpr (CONSTANT_ZERO != 0) return matrix.constant_zero;
    return ZERO == 0 ? 0.0f : number<ZERO>(zero);
  }
};

// Where the group of a column is in its row.
__device__ __forceinline__ int group_of(int column) { return column / SIZE; }

// The four integers of a quad as bytes, from the words of its unit that have its bits.
template <class Words>
__device__ __forceinline__ u32 quad_bytes(const Words& words, int quad) {
  if constexpr (BITS == 8) return words.eight(quad);
  u32 bytes = 0;
  if constexpr ((BITS & 4) != 0) bytes = words.four(quad / 2) >> quad % 2 * 4 & 0x0f0f0f0fu;
  if constexpr ((BITS & 2) != 0) {
    bytes |= (words.two(quad / 4) >> quad % 4 * 2 & 0x03030303u) << (BITS & 4);
  }
  if constexpr ((BITS & 1) != 0) bytes |= (words.one() >> quad & 0x01010101u) << (BITS & 6);
  return bytes;
}

// Integers below 128 are lifted without a conversion: put at the top of the mantissa of 1, integer
// v gives 1 + v / 128.
constexpr bool kSmall = VALUES == 0 && BITS < 8;
constexpr u32 kSmallLift = 0x80808080u;
constexpr u32 kOneBits = 0x3f800000u;

// The number that byte `i` of a quad stands for, where integers are small: 1 + v / 128. The quad's
// bytes have kSmallLift added.
__device__ __forceinline__ float small_value(u32 lifted, int i) {
  return __uint_as_float(__byte_perm(lifted, kOneBits, 0x7044u + (i << 8)));
}

// The bits of two halves that are, for E4M3, a 256th of what bytes `2 i` and `2 i + 1` stand for,
// and for E5M2 that itself. NaN of E4M3 must not occur.
__device__ __forceinline__ u32 half_pair(u32 bytes, int i) {
  const u32 tops = __byte_perm(bytes, 0, i == 0 ? 0x1404u : 0x3424u);
  return VALUES == 2 ? tops : (tops & 0x80008000u) | (tops & 0x7f007f00u) >> 1;
}

// The number that byte `i` of a quad stands for.
__device__ __forceinline__ float value_of(u32 bytes, int i) {
  if constexpr (VALUES == 0) {
    return __fadd_rn(__uint_as_float(__byte_perm(bytes, kLiftBits, 0x7440u + i)), -kLift);
  }
  const float value = half_value(half_pair(bytes, i / 2) >> i % 2 * 16);
  if constexpr (VALUES == 2) return value;
  return (bytes >> 8 * i & 0x7fu) == 0x7fu ? __int_as_float(0x7fc00000) : value * 256.0f;
}
