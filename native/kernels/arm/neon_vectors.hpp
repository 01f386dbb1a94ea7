// What the kernels in generic/ need, for NEON: a vector of 64 symbols is four quarters of 16.
// Escapes are merged by TBX, with indices from a table of 256 bit patterns. Everything has internal
// linkage.
#pragma once

#include <arm_neon.h>

#include "kernels/generic/words.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

// Indices for TBX that put the next bytes of a list where a bit is set, and are out of its range
// elsewhere. The indices of 16 symbols are the sum of an entry for each of their two bytes.
struct ExpandTable {
  std::uint8_t first[256][16];   // indices of bits 0-7, then the number of ones, eight times
  std::uint8_t second[256][16];  // zeros, then the indices of bits 8-15 without those ones
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (unsigned bits = 0; bits < 256; ++bits) {
    std::uint8_t ones = 0;
    for (unsigned i = 0; i < 8; ++i) {
      const bool set = (bits >> i & 1) != 0;
      table.first[bits][i] = table.second[bits][8 + i] = set ? ones : 0x80;
      if (set) ++ones;
    }
    for (unsigned i = 8; i < 16; ++i) table.first[bits][i] = ones;
  }
  return table;
}

alignas(64) constexpr ExpandTable kExpand = make_expand_table();

struct NeonVectors {
  using Part = uint8x16_t;
  using Mask = uint8x16_t;  // 0xff where marked
  static constexpr std::size_t kPartBytes = 16;
  static constexpr std::size_t kParts = kVector / kPartBytes;

  static Part load(const std::uint8_t* p) { return vld1q_u8(p); }
  // Stores all parts in one go: were the stores spread between loads, they could not be paired.
  static void store(std::uint8_t* p, const Part (&parts)[kParts]) {
    for (std::size_t i = 0; i < kParts; ++i) vst1q_u8(p + i * kPartBytes, parts[i]);
  }

  // Byte k is the number of ones in bytes 0 to k of `bits`, at most 64.
  static std::uint64_t counts_up_to(uint8x8_t bits) {
    return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(bits)), 0) * 0x0101010101010101u;
  }
  static std::size_t count_ones(std::uint64_t word) { return counts_up_to(vcreate_u8(word)) >> 56; }

  using Plane = uint8x16_t;  // of which the first eight bytes count
  static Plane load_plane(const std::uint8_t* p) { return vld1q_u8(p); }

  class BitSpreader {
   public:
    BitSpreader() {
      for (int part = 0; part < 4; ++part) {
        spread_[part] = vcombine_u8(vdup_n_u8(static_cast<std::uint8_t>(2 * part)),
                                    vdup_n_u8(static_cast<std::uint8_t>(2 * part + 1)));
      }
    }
    Mask mask(Plane plane, std::size_t part) const {
      const uint8x16_t bytes = vqtbl1q_u8(plane, spread_[part]);
      return vtstq_u8(bytes, vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)));
    }

   private:
    uint8x16_t spread_[kParts];
  };

  template <std::size_t Bits>
  static Part fields_of(const Mask (&masks)[Bits]) {
    uint8x16_t field = bit(masks[Bits - 1]);
    for (std::size_t i = Bits - 1; i-- > 0;) field = append_bit(field, masks[i]);
    return field;
  }

  template <int Bits, bool Escape>
  class Table {
   public:
    explicit Table(const std::uint8_t* entries)
        : first_(vdupq_n_u8(entries[0])), second_(vdupq_n_u8(entries[1])) {
      for (int i = 0; i < kPieces; ++i) pieces_.val[i] = vld1q_u8(entries + 16 * i);
    }
    Part at(Part field) const {
      if constexpr (Bits <= 4) return vqtbl1q_u8(pieces_.val[0], field);
      if constexpr (Bits == 5) return vqtbl2q_u8({pieces_.val[0], pieces_.val[1]}, field);
      return vqtbl4q_u8(pieces_, field);
    }
    Part at_bit(Mask mask) const { return Escape ? first_ : vbslq_u8(mask, second_, first_); }

   private:
    static constexpr int kPieces = Bits <= 4 ? 1 : 1 << (Bits - 4);
    uint8x16x4_t pieces_;
    uint8x16_t first_;
    uint8x16_t second_;
  };

  using Flags = uint8x8_t;
  template <std::size_t Bits>
  static Flags all_of(const Plane (&planes)[Bits]) {
    uint8x16_t all = planes[0];
    for (std::size_t bit = 1; bit < Bits; ++bit) all = vandq_u8(all, planes[bit]);
    return vget_low_u8(all);
  }
  static Flags flags_of(const Mask (&masks)[kParts]) {
    const uint8x16_t weights = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t low = vpaddq_u8(vandq_u8(masks[0], weights), vandq_u8(masks[1], weights));
    const uint8x16_t high = vpaddq_u8(vandq_u8(masks[2], weights), vandq_u8(masks[3], weights));
    const uint8x16_t bits = vpaddq_u8(low, high);
    return vget_low_u8(vpaddq_u8(bits, bits));
  }

  class Merge {
   public:
    Merge(Flags flags, const Mask (&)[kParts])
        : Merge(vget_lane_u64(vreinterpret_u64_u8(flags), 0), counts_up_to(flags)) {}

    std::size_t count() const { return counts_ >> 56; }
    std::uint64_t word() const { return word_; }

    Part into(Part symbols, std::size_t part, const std::uint8_t* next) const {
      return vqtbx1q_u8(symbols, vld1q_u8(next + before(part)), indices(part));
    }

    Part between(const std::uint8_t* left, const std::uint8_t* right, std::size_t part) const {
      const Merge others(~word_, 0x4038302820181008 - counts_);
      const Part lefts = vqtbl1q_u8(vld1q_u8(left + others.before(part)), others.indices(part));
      return into(lefts, part, right);
    }

   private:
    Merge(std::uint64_t word, std::uint64_t counts) : word_(word), counts_(counts) {}

    // Kept in a register, so that one AND shifts and masks.
    static std::uint64_t entry_mask() {
      std::uint64_t mask = 0xff0;
      asm("" : "+r"(mask));
      return mask;
    }

    // How many marked symbols come before a part.
    std::size_t before(std::size_t part) const {
      return part == 0 ? 0 : counts_ >> (part * 16 - 8) & 0xff;
    }
    uint8x16_t indices(std::size_t part) const {
      return vaddq_u8(vld1q_u8(kExpand.first[0] + entry(2 * part)),
                      vld1q_u8(kExpand.second[0] + entry(2 * part + 1)));
    }
    std::size_t entry(std::size_t byte) const {
      return (byte == 0 ? word_ << 4 : word_ >> (8 * byte - 4)) & entry_mask_;
    }

    std::uint64_t word_;
    std::uint64_t counts_;
    std::uint64_t entry_mask_ = entry_mask();
  };

  struct OnesCounter {
    static constexpr std::size_t kBits = 128;
    static uint8x16_t load(const std::uint8_t* p) { return vld1q_u8(p); }
    // Lanes gain at most 16 each time, and a block has at most 8192 bits.
    void add(uint8x16_t ones) { sums = vpadalq_u8(sums, vcntq_u8(ones)); }
    std::size_t total() const { return vaddlvq_u16(sums); }

    uint16x8_t sums = vdupq_n_u16(0);
  };

  // There are 32 registers.
  static constexpr bool kHoldsPacked = true;

  template <int Width, int Index>
  static Part field(Part packed) {
    constexpr int kShift = Width * Index;
    if constexpr (kShift != 0) packed = vshrq_n_u8(packed, kShift);
    if constexpr (kShift + Width < 8) packed = vandq_u8(packed, vdupq_n_u8((1 << Width) - 1));
    return packed;
  }
  static Part bit(Mask mask) { return vshrq_n_u8(mask, 7); }
  template <int Width>
  static Part append(Part high, Part low) {
    return vsliq_n_u8(low, high, Width);
  }
  static Part append_bit(Part high, Mask mask) { return vsliq_n_u8(mask, high, 1); }
  static Part either(Part a, Part b) { return vorrq_u8(a, b); }
  static Mask both(Mask a, Mask b) { return vandq_u8(a, b); }
  static Mask equal(Part part, int value) {
    return vceqq_u8(part, vdupq_n_u8(static_cast<std::uint8_t>(value)));
  }
};

}  // namespace
}  // namespace entrollm
