// The stored form of a flat matrix. docs/reference/format.md has the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/flat.hpp"

namespace entrollm {

// The fields of a segment: their width, and the symbol of field 0.
struct FlatWindow {
  int bits;
  std::uint8_t base;

  int largest() const { return base + (1 << bits) - 1; }
  bool is_valid() const { return is_flat_width(bits) && largest() <= 255; }

  // The form in which it is stored.
  std::uint16_t word() const { return static_cast<std::uint16_t>(bits | base << 8); }
  static FlatWindow of(std::uint16_t word) {
    return {word & 0xff, static_cast<std::uint8_t>(word >> 8)};
  }
};

// Segment i holds the rows from i * segment_rows on.
struct FlatStreams {
  std::size_t segment_rows;
  std::span<const std::uint8_t> fields;      // of all segments, padded as stored_bytes() says
  std::span<const std::uint8_t> patches;     // of all rows, padded likewise; 16-bit aligned
  std::span<const std::uint16_t> row_sizes;  // bytes of each row's patches; empty if there are none
  std::span<const std::uint16_t> windows;    // FlatWindow::word() of each segment
};

}  // namespace entrollm
