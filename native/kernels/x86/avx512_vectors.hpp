// What the kernels of lists in generic/ need, for AVX-512 (VBMI, VBMI2, VNNI, GFNI): a vector of 64
// symbols is one register, and escapes are merged with one VPEXPANDB. Everything has internal
// linkage: code compiled for AVX-512 must not be shared by the linker with code for lesser
// processors.
#pragma once

#include <immintrin.h>

#include "kernels/generic/words.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

inline std::size_t popcount(std::uint64_t word) {
  return static_cast<std::size_t>(_mm_popcnt_u64(word));
}

// Keeps the compiler from repeating a load as the memory operand of every use.
inline void keep_in_register(__m512i& v) { asm("" : "+v"(v)); }

// Merges the next bytes at `p` into `v` where `mask` is set. The source goes through a register:
// with a memory operand the expansion is slow on some processors.
inline __m512i expand(__m512i v, __mmask64 mask, const std::uint8_t* p) {
  __m512i source = load(p);
  keep_in_register(source);
  return _mm512_mask_expand_epi8(v, mask, source);
}

struct Avx512Vectors {
  using Part = __m512i;
  using Mask = __mmask64;
  using Plane = __mmask64;
  using Flags = __mmask64;
  static constexpr std::size_t kPartBytes = kVector;
  static constexpr std::size_t kParts = 1;

  static void store(std::uint8_t* p, const Part (&parts)[1]) { _mm512_storeu_si512(p, parts[0]); }
  static Plane load_plane(const std::uint8_t* p) { return load_word(p); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static std::size_t count_ones(std::uint64_t word) { return popcount(word); }

  struct BitSpreader {
    static Mask mask(Plane plane, std::size_t) { return plane; }
  };

  template <std::size_t Bits>
  static Part fields_of(const Mask (&masks)[Bits]) {
    __m512i field = _mm512_maskz_set1_epi8(masks[0], 1);
    for (std::size_t i = 1; i < Bits; ++i) {
      const __m512i value = _mm512_set1_epi8(static_cast<char>(1 << i));
      field = _mm512_mask_add_epi8(field, masks[i], field, value);
    }
    return field;
  }

  template <int Bits, bool Escape>
  class Table {
   public:
    explicit Table(const std::uint8_t* entries)
        : entries_(load(entries)),
          first_(_mm512_set1_epi8(static_cast<char>(entries[0]))),
          second_(_mm512_set1_epi8(static_cast<char>(entries[1]))) {}
    Part at(Part field) const { return _mm512_permutexvar_epi8(field, entries_); }
    Part at_bit(Mask mask) const {
      return Escape ? first_ : _mm512_mask_blend_epi8(mask, first_, second_);
    }

   private:
    __m512i entries_;
    __m512i first_;
    __m512i second_;
  };

  template <std::size_t Bits>
  static Flags all_of(const Plane (&planes)[Bits]) {
    Flags all = planes[0];
    for (std::size_t bit = 1; bit < Bits; ++bit) all &= planes[bit];
    return all;
  }

  class Merge {
   public:
    Merge(Flags flags, const Mask (&)[1]) : flags_(flags) {}
    std::size_t count() const { return popcount(flags_); }
    std::uint64_t word() const { return flags_; }
    Part into(Part symbols, std::size_t, const std::uint8_t* next) const {
      return expand(symbols, flags_, next);
    }
    Part between(const std::uint8_t* left, const std::uint8_t* right, std::size_t) const {
      return expand(_mm512_maskz_expand_epi8(~flags_, load(left)), flags_, right);
    }

   private:
    Flags flags_;
  };
};

// Bits at and after a byte boundary: 64 bytes of ones, then of zeros.
struct ByteMasks {
  std::uint8_t bytes[128];
  constexpr ByteMasks() : bytes{} {
    for (int i = 0; i < 64; ++i) bytes[i] = 0xff;
  }
};
inline constexpr ByteMasks kByteMasks;

// See Kernels::count_all_ones.
inline std::size_t count_all_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  const std::size_t plane_bytes = (count + 7) / 8;
  const auto plane = [&](int bit, std::size_t byte) {
    return planes + static_cast<std::size_t>(bit) * plane_bytes + byte;
  };
  const auto all_ones = [&](std::size_t byte) {
    __m512i ones = load(plane(0, byte));
    for (int bit = 1; bit < bits; ++bit) ones = _mm512_and_si512(ones, load(plane(bit, byte)));
    return ones;
  };
  const std::size_t whole = count / 8;
  __m512i counts = _mm512_setzero_si512();
  std::size_t byte = 0;
  for (; byte + 64 <= whole; byte += 64) {
    counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(all_ones(byte)));
  }
  // The rest is counted without a branch: short lists differ in length from block to block.
  const __m512i rest =
      _mm512_and_si512(all_ones(byte), load(kByteMasks.bytes + 64 - (whole - byte)));
  counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(rest));
  std::uint8_t last = 0xff;
  for (int bit = 0; bit < bits; ++bit) last &= *plane(bit, whole);
  return static_cast<std::size_t>(_mm512_reduce_add_epi64(counts)) +
         popcount(last & ((1u << (count % 8)) - 1));
}

}  // namespace
}  // namespace entrollm
