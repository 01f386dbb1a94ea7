// Flat fields in registers of 16 bytes. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <arm_neon.h>

#include "format/flat.hpp"

namespace entrollm {
namespace {

struct FlatLanes {
  static constexpr std::size_t kLanes = 16;
  using Bytes = uint8x16_t;

  template <int Bits, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes fields(const std::uint8_t* chunk) {
    if constexpr (Bits == 8) return vld1q_u8(chunk + Register * kLanes);
    if constexpr (Bits == 3) return octals<Register>(chunk);
    Bytes bytes = vdupq_n_u8(0);
    if constexpr (has_flat_part(Bits, 4)) bytes = nibbles<Register>(chunk);
    if constexpr (has_flat_part(Bits, 2)) {
      constexpr int kAt = flat_part_shift(Bits, 2);
      const Bytes more = pairs<kAt, Register>(chunk + flat_part_offset(Bits, 2));
      // The highest pair shifts nothing else in.
      bytes = kAt == 0 && Register == 3 ? more : insert<3, kAt>(bytes, more);
    }
    if constexpr (has_flat_part(Bits, 1)) {
      constexpr int kAt = flat_part_shift(Bits, 1);
      bytes = insert<1, kAt>(bytes, single_bits<kAt, Register>(chunk + flat_part_offset(Bits, 1)));
    }
    return bytes;
  }

  // Sixteen entries, and those that bytes below 16 choose.
  using Table = Bytes;
  [[gnu::always_inline]] static inline Table load_table(const std::uint8_t* entries) {
    return vld1q_u8(entries);
  }
  [[gnu::always_inline]] static inline Bytes look_up(Table table, Bytes bytes) {
    return vqtbl1q_u8(table, bytes);
  }

  [[gnu::always_inline]] static inline void store(std::uint8_t* out, Bytes bytes) {
    vst1q_u8(out, bytes);
  }
  [[gnu::always_inline]] static inline Bytes splat(std::uint8_t value) { return vdupq_n_u8(value); }
  [[gnu::always_inline]] static inline Bytes add(Bytes a, Bytes b) { return vaddq_u8(a, b); }

 private:
  template <std::size_t Register>
  [[gnu::always_inline]] static inline Bytes nibbles(const std::uint8_t* part) {
    const Bytes both = vld1q_u8(part + Register % 2 * kLanes);
    return Register < 2 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
  }

  // Fields of 3 bits. Two registers' fields are put together at once, in nibbles whose highest bit
  // is 0: those of registers 0 and 2, and those of 1 and 3.
  template <std::size_t Register>
  [[gnu::always_inline]] static inline Bytes octals(const std::uint8_t* chunk) {
    constexpr bool kIsOdd = Register % 2 != 0;
    const Bytes two = kIsOdd ? vshrq_n_u8(vld1q_u8(chunk), 2) : vld1q_u8(chunk);
    const Bytes mask = vcombine_u8(vdup_n_u8(0x55), vdup_n_u8(0xaa));
    const Bytes one = vandq_u8(eight_bytes(chunk + flat_part_offset(3, 1)), mask);
    constexpr std::int8_t kLeft = kIsOdd ? 0 : 2;
    const int8x16_t left = vcombine_s8(vdup_n_s8(kLeft), vdup_n_s8(kLeft - 1));
    const Bytes both = vbslq_u8(vdupq_n_u8(0x33), two, vshlq_u8(one, left));
    return Register < 2 ? vandq_u8(both, vdupq_n_u8(7)) : vshrq_n_u8(both, 4);
  }

  [[gnu::always_inline]] static inline Bytes eight_bytes(const std::uint8_t* bytes) {
    std::uint64_t eight;
    __builtin_memcpy(&eight, bytes, sizeof eight);
    return vreinterpretq_u8_u64(vdupq_n_u64(eight));
  }

  // The pairs of bits at their place, with others beside them.
  template <int At, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes pairs(const std::uint8_t* part) {
    constexpr int kRight = 2 * static_cast<int>(Register) - At;
    const Bytes all = vld1q_u8(part);
    if constexpr (kRight > 0) return vshrq_n_u8(all, kRight);
    if constexpr (kRight < 0) return vshlq_n_u8(all, -kRight);
    return all;
  }

  template <int At, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes single_bits(const std::uint8_t* part) {
    constexpr auto kLeft = static_cast<std::int8_t>(At - 2 * static_cast<int>(Register));
    const int8x16_t left = vcombine_s8(vdup_n_s8(kLeft), vdup_n_s8(kLeft - 1));
    return vshlq_u8(eight_bytes(part), left);
  }

  // bytes | (more & Mask << At); bits of `bytes` from At on are zero.
  template <int Mask, int At>
  [[gnu::always_inline]] static inline Bytes insert(Bytes bytes, Bytes more) {
    if constexpr (At == 0) return vandq_u8(more, vdupq_n_u8(Mask));
    return vbslq_u8(vdupq_n_u8(Mask << At), more, bytes);
  }
};

}  // namespace
}  // namespace entrollm
