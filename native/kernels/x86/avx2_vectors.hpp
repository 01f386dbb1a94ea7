// What the kernels in generic/ need, for AVX2 (with BMI2 and POPCNT): a vector of 64 symbols is two
// halves of 32. Escapes are merged in lanes of 16 symbols by a byte shuffle, whose indices are
// prefix counts of the escape mask. Everything has internal linkage: code compiled for AVX2 must
// not be shared by the linker with code for lesser processors.
#pragma once

#include <immintrin.h>

#include "kernels/generic/words.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

struct Avx2Vectors {
  using Part = __m256i;
  using Mask = __m256i;  // 0xff where marked
  static constexpr std::size_t kPartBytes = 32;
  static constexpr std::size_t kParts = kVector / kPartBytes;

  static Part load(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(std::uint8_t* p, const Part (&parts)[kParts]) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), parts[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kPartBytes), parts[1]);
  }

  static std::size_t count_ones(std::uint64_t word) {
    return static_cast<std::size_t>(_mm_popcnt_u64(word));
  }

  // Bits stay in memory, from where they are broadcast.
  struct Plane {
    const std::uint8_t* bits;
  };
  static Plane load_plane(const std::uint8_t* p) { return {p}; }

  struct BitSpreader {
    static Mask mask(Plane plane, std::size_t part) {
      const __m256i spread =
          _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
      const __m256i select = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
      std::int32_t word;
      __builtin_memcpy(&word, plane.bits + part * 4, sizeof word);
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
      return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
    }
  };

  template <std::size_t Bits>
  static Part fields_of(const Mask (&masks)[Bits]) {
    __m256i field = bit(masks[0]);
    for (std::size_t i = 1; i < Bits; ++i) {
      const __m256i value = _mm256_set1_epi8(static_cast<char>(1 << i));
      field = _mm256_or_si256(field, _mm256_and_si256(masks[i], value));
    }
    return field;
  }

  // With an escape, its entry reads as zero: Merge only adds symbols.
  template <int Bits, bool Escape>
  class Table {
   public:
    explicit Table(const std::uint8_t* entries) {
      alignas(16) std::uint8_t bytes[64];
      __builtin_memcpy(bytes, entries, sizeof bytes);
      if (Escape) bytes[(1 << Bits) - 1] = 0;
      for (int i = kPieces - 1; i >= 0; --i) {
        __m128i piece = load16(bytes + 16 * i);
        if (i > 0) piece = _mm_xor_si128(piece, load16(bytes + 16 * (i - 1)));
        pieces_[i] = _mm256_broadcastsi128_si256(piece);
      }
    }

    // A shuffle yields zero for negative indices. So every piece up to the field's own adds its
    // difference from the piece before.
    Part at(Part field) const {
      __m256i symbols = _mm256_shuffle_epi8(pieces_[0], field);
      for (int i = 1; i < kPieces; ++i) {
        field = _mm256_sub_epi8(field, _mm256_set1_epi8(16));
        symbols = _mm256_xor_si256(symbols, _mm256_shuffle_epi8(pieces_[i], field));
      }
      return symbols;
    }

    Part at_bit(Mask mask) const {
      if constexpr (!Escape) return at(bit(mask));
      return _mm256_andnot_si256(mask, _mm256_shuffle_epi8(pieces_[0], _mm256_setzero_si256()));
    }

   private:
    static constexpr int kPieces = Bits <= 4 ? 1 : 1 << (Bits - 4);
    __m256i pieces_[kPieces];
  };

  struct Flags {
    std::uint32_t half[2];
  };
  template <std::size_t Bits>
  static Flags all_of(const Plane (&planes)[Bits]) {
    std::uint64_t all = load_word(planes[0].bits);
    for (std::size_t bit = 1; bit < Bits; ++bit) all &= load_word(planes[bit].bits);
    return {{static_cast<std::uint32_t>(all), static_cast<std::uint32_t>(all >> 32)}};
  }
  static Flags flags_of(const Mask (&masks)[kParts]) {
    return {{static_cast<std::uint32_t>(_mm256_movemask_epi8(masks[0])),
             static_cast<std::uint32_t>(_mm256_movemask_epi8(masks[1]))}};
  }

  class Merge {
   public:
    Merge(const Flags& flags, const Mask (&masks)[kParts]) : masks_{masks[0], masks[1]} {
      word_ = std::uint64_t{flags.half[1]} << 32 | flags.half[0];
      before_[1] = count_ones(flags.half[0] & 0xffff);
      before_[2] = count_ones(flags.half[0]);
      before_[3] = before_[2] + count_ones(flags.half[1] & 0xffff);
      before_[4] = before_[2] + count_ones(flags.half[1]);
    }

    std::size_t count() const { return before_[4]; }
    std::uint64_t word() const { return word_; }

    Part into(Part symbols, std::size_t part, const std::uint8_t* next) const {
      return _mm256_or_si256(symbols, marked(part, negative_counts(masks_[part]), next));
    }

    Part between(const std::uint8_t* left, const std::uint8_t* right, std::size_t part) const {
      // Where the symbols of the left list would lie in each lane if there were no others.
      const __m256i position =
          _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5,
                           6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m256i counts = negative_counts(masks_[part]);
      const std::uint8_t* lefts = left + part * kPartBytes;
      const __m256i others = _mm256_shuffle_epi8(
          load_lanes(lefts - before_[2 * part], lefts + 16 - before_[2 * part + 1]),
          _mm256_add_epi8(position, counts));
      return _mm256_or_si256(_mm256_andnot_si256(masks_[part], others),
                             marked(part, counts, right));
    }

   private:
    // Minus the number of marked symbols up to and with each one, counted in each lane.
    static __m256i negative_counts(Mask mask) {
      const __m256i last_of_low_half =
          _mm256_setr_epi64x(-1, 0x0707070707070707, -1, 0x0707070707070707);
      __m256i counts = _mm256_add_epi8(mask, _mm256_slli_epi64(mask, 8));
      counts = _mm256_add_epi8(counts, _mm256_slli_epi64(counts, 16));
      counts = _mm256_add_epi8(counts, _mm256_slli_epi64(counts, 32));
      return _mm256_add_epi8(counts, _mm256_shuffle_epi8(counts, last_of_low_half));
    }

    // The list's symbols where marked, zero elsewhere: the shuffle's indices are negative there.
    __m256i marked(std::size_t part, __m256i counts, const std::uint8_t* next) const {
      const __m256i last = _mm256_or_si256(masks_[part], _mm256_set1_epi8(static_cast<char>(0x80)));
      return _mm256_shuffle_epi8(load_lanes(next + before_[2 * part], next + before_[2 * part + 1]),
                                 _mm256_sub_epi8(last, counts));
    }

    Mask masks_[kParts];
    std::uint64_t word_;
    std::size_t before_[5] = {};  // marked symbols before each lane, and in all
  };

  struct OnesCounter {
    static constexpr std::size_t kBits = 64;
    static std::uint64_t load(const std::uint8_t* p) { return load_word(p); }
    void add(std::uint64_t ones) { sum += count_ones(ones); }
    std::size_t total() const { return sum; }

    std::size_t sum = 0;
  };

  // There are 16 registers: packed vectors are loaded again for each vector of symbols.
  static constexpr bool kHoldsPacked = false;

  template <int Width, int Index>
  static Part field(Part packed) {
    return _mm256_and_si256(_mm256_srli_epi16(packed, Width * Index),
                            _mm256_set1_epi8((1 << Width) - 1));
  }
  static Part bit(Mask mask) { return _mm256_and_si256(mask, _mm256_set1_epi8(1)); }
  template <int Width>
  static Part append(Part high, Part low) {
    return _mm256_or_si256(_mm256_slli_epi16(high, Width), low);
  }
  static Part append_bit(Part high, Mask mask) {
    return _mm256_sub_epi8(_mm256_add_epi8(high, high), mask);
  }
  static Part either(Part a, Part b) { return _mm256_or_si256(a, b); }
  static Mask both(Mask a, Mask b) { return _mm256_and_si256(a, b); }
  static Mask equal(Part part, int value) {
    return _mm256_cmpeq_epi8(part, _mm256_set1_epi8(static_cast<char>(value)));
  }

 private:
  static __m128i load16(const std::uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m256i load_lanes(const std::uint8_t* low, const std::uint8_t* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(low)), load16(high), 1);
  }
};

}  // namespace
}  // namespace entrollm
