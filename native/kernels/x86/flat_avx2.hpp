// Flat fields in registers of 32 bytes. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <immintrin.h>

#include "format/flat.hpp"

namespace entrollm {
namespace {

struct FlatLanes {
  static constexpr std::size_t kLanes = 32;
  using Bytes = __m256i;

  template <int Bits, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes fields(const std::uint8_t* chunk) {
    if constexpr (Bits == 8) return load(chunk + Register * kLanes);
    Bytes bytes = _mm256_setzero_si256();
    if constexpr (has_flat_part(Bits, 4)) bytes = nibbles<Register>(chunk);
    if constexpr (has_flat_part(Bits, 2)) {
      bytes = _mm256_or_si256(
          bytes, pairs<flat_part_shift(Bits, 2), Register>(chunk + flat_part_offset(Bits, 2)));
    }
    if constexpr (has_flat_part(Bits, 1)) {
      bytes = _mm256_or_si256(bytes, single_bits<flat_part_shift(Bits, 1), Register>(
                                         chunk + flat_part_offset(Bits, 1)));
    }
    return bytes;
  }

  [[gnu::always_inline]] static inline Bytes load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  // Sixteen entries, and those that bytes below 16 choose.
  using Table = Bytes;
  [[gnu::always_inline]] static inline Table load_table(const std::uint8_t* entries) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  [[gnu::always_inline]] static inline Bytes look_up(Table table, Bytes bytes) {
    return _mm256_shuffle_epi8(table, bytes);
  }

  [[gnu::always_inline]] static inline void store(std::uint8_t* out, Bytes bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
  }
  [[gnu::always_inline]] static inline Bytes splat(std::uint8_t value) {
    return _mm256_set1_epi8(static_cast<char>(value));
  }
  [[gnu::always_inline]] static inline Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }

 private:
  template <std::size_t Register>
  [[gnu::always_inline]] static inline Bytes nibbles(const std::uint8_t* part) {
    const Bytes both = load(part);
    return _mm256_and_si256(Register == 0 ? both : _mm256_srli_epi16(both, 4), splat(15));
  }

  // Bits of neighbouring bytes enter at the shifts, and the mask drops them.
  template <int At, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes pairs(const std::uint8_t* part) {
    const Bytes all =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
    constexpr int kFirst = 4 * static_cast<int>(Register) - At;  // bits to the right
    const Bytes shifted = shift_right<Register, kFirst, kFirst, kFirst + 2, kFirst + 2>(all);
    return _mm256_and_si256(shifted, splat(3 << At));
  }

  template <int At, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes single_bits(const std::uint8_t* part) {
    long long eight;
    __builtin_memcpy(&eight, part, sizeof eight);
    constexpr int kFirst = 4 * static_cast<int>(Register) - At;
    const Bytes shifted = shift_right<Register, kFirst, kFirst + 1, kFirst + 2, kFirst + 3>(
        _mm256_set1_epi64x(eight));
    return _mm256_and_si256(shifted, splat(1 << At));
  }

  // Shifts each quarter right by its count, or left by a negative one. Where counts have both
  // signs, the first register needs no bit that a shift to the left drops, and the second none that
  // a shift to the right drops.
  template <std::size_t Register, int A, int B, int C, int D>
  [[gnu::always_inline]] static inline Bytes shift_right(Bytes x) {
    static_assert(A <= B && B <= C && C <= D);
    constexpr int kLeft = A < 0 ? -A : 0;
    if constexpr (A == 0 && D == 0) {
      return x;
    } else if constexpr (A >= 0 || (D > 0 && Register == 0)) {
      if constexpr (kLeft != 0) x = _mm256_slli_epi64(x, kLeft);
      return _mm256_srlv_epi64(x, _mm256_setr_epi64x(A + kLeft, B + kLeft, C + kLeft, D + kLeft));
    } else {
      constexpr int kRight = D > 0 ? D : 0;
      if constexpr (kRight != 0) x = _mm256_srli_epi64(x, kRight);
      return _mm256_sllv_epi64(x,
                               _mm256_setr_epi64x(kRight - A, kRight - B, kRight - C, kRight - D));
    }
  }
};

}  // namespace
}  // namespace entrollm
