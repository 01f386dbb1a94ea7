#include "format/flat.hpp"

#include <initializer_list>

namespace entrollm {
namespace {

// Where a part of `part` bits keeps a column's bits.
struct Place {
  std::size_t byte;
  int shift;
};

Place place_of(int bits, int part, std::size_t column) {
  const std::size_t stride = kVector * static_cast<std::size_t>(part) / 8;  // bytes of the part
  return {flat_part_offset(bits, part) + column % stride, static_cast<int>(column / stride) * part};
}

}  // namespace

std::uint8_t flat_field(const std::uint8_t* chunk, int bits, std::size_t column) {
  if (bits == 8) return chunk[column];
  unsigned field = 0;
  for (const int part : {4, 2, 1}) {
    if (!has_flat_part(bits, part)) continue;
    const Place place = place_of(bits, part, column);
    const unsigned value = (chunk[place.byte] >> place.shift) & ((1u << part) - 1);
    field |= value << flat_part_shift(bits, part);
  }
  return static_cast<std::uint8_t>(field);
}

void set_flat_field(std::uint8_t* chunk, int bits, std::size_t column, std::uint8_t field) {
  if (bits == 8) {
    chunk[column] = field;
    return;
  }
  for (const int part : {4, 2, 1}) {
    if (!has_flat_part(bits, part)) continue;
    const Place place = place_of(bits, part, column);
    const unsigned value = (field >> flat_part_shift(bits, part)) & ((1u << part) - 1);
    chunk[place.byte] = static_cast<std::uint8_t>(chunk[place.byte] | value << place.shift);
  }
}

}  // namespace entrollm
