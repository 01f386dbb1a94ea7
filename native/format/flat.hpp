// The flat layout: rows of fields of one width, of which every value is a symbol. Columns are
// padded to chunks of kVector; a chunk is the concatenation of a 4-bit, a 2-bit and a 1-bit part,
// as far as the width has them, the lowest bits of a field in the first part:
//
//   width  2 = [2]  3 = [2,1]  4 = [4]  5 = [4,1]  6 = [4,2]  7 = [4,2,1]  8 = [8]
//
//   4-bit part, 32 bytes: byte i has column i in its low and column 32 + i in its high nibble
//   2-bit part, 16 bytes: bits 2k and 2k + 1 of byte i belong to column 16 k + i
//   1-bit part,  8 bytes: bit k of byte i belongs to column 8 k + i
//   8-bit part, 64 bytes: one byte a column
//
// Chunks follow each other along a row, and rows follow each other without padding.
//
// A patch is a word of 16 bits: in its low 12 bits, the columns from the patch before it in its
// row, or from column 0; in its high 4 bits, a difference from -8 to 7. A larger difference takes
// several patches of one column, and a longer way takes patches with a difference of 0 in between.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/layout.hpp"

namespace entrollm {

inline constexpr int kMinFlatBits = 2;
inline constexpr int kMaxFlatBits = 8;

constexpr bool is_flat_width(int bits) { return bits >= kMinFlatBits && bits <= kMaxFlatBits; }

// Bytes of a chunk, and of a row of `chunks` of them.
constexpr std::size_t flat_chunk_bytes(int bits) { return static_cast<std::size_t>(bits) * 8; }
constexpr std::size_t flat_row_bytes(std::size_t chunks, int bits) {
  return chunks * flat_chunk_bytes(bits);
}

// Whether fields of `bits` bits have a part of `part` bits (4, 2 or 1); the field's bit at which it
// begins, and its first byte in a chunk.
constexpr bool has_flat_part(int bits, int part) { return bits != 8 && (bits & part) != 0; }
constexpr int flat_part_shift(int bits, int part) { return bits & ~(2 * part - 1); }
constexpr std::size_t flat_part_offset(int bits, int part) {
  return flat_chunk_bytes(flat_part_shift(bits, part));
}

using FlatPatch = std::uint16_t;
inline constexpr std::size_t kMostPatchGap = 4095;
inline constexpr int kLeastPatch = -8;
inline constexpr int kMostPatch = 7;

constexpr std::size_t patch_gap(FlatPatch patch) { return patch & kMostPatchGap; }
constexpr int patch_difference(FlatPatch patch) { return static_cast<std::int16_t>(patch) >> 12; }
constexpr FlatPatch make_patch(std::size_t gap, int difference) {
  return static_cast<FlatPatch>(gap | static_cast<std::size_t>(difference & 15) << 12);
}

// The field of a column, below kVector, of a chunk: the definition of the layout.
std::uint8_t flat_field(const std::uint8_t* chunk, int bits, std::size_t column);

// Sets it in a chunk of zeros; `field` is below 2^bits.
void set_flat_field(std::uint8_t* chunk, int bits, std::size_t column, std::uint8_t field);

}  // namespace entrollm
