// Symbols become a segment of a flat matrix: the cheapest width and window, and patches outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format/geometry.hpp"
#include "product/arena.hpp"
#include "product/flat_matrix.hpp"

namespace entrollm {

// The width of the fields and the symbol of field 0.
struct FlatWindow {
  int bits;
  std::uint8_t base;

  int largest() const { return base + (1 << bits) - 1; }
};

// The window that costs least, in memory traffic and in time, for symbols that occur `counts[s]`
// times each; a symbol outside costs a patch, and a window of 8 bits has none outside.
FlatWindow choose_flat_window(const std::uint64_t (&counts)[256], bool is_wide);

// Bytes that segments of `segment_rows` rows of a matrix take at most: those of 8-bit fields, which
// segments get whose patches would take more.
std::size_t most_flat_bytes(const Geometry& geometry, std::size_t segment_rows);

// A thread's buffers for one segment at a time.
class Transcoder {
 public:
  // Room for the symbols of a segment, in rows of whole chunks, for the caller to fill.
  std::uint8_t* reserve(std::size_t size);

  // Writes the symbols' segment to the arena.
  FlatSegment transcode(std::size_t rows, std::size_t columns, Arena& arena);

 private:
  FlatWindow choose(std::size_t rows, std::size_t columns) const;
  void find_patches(std::size_t rows, std::size_t columns, const FlatWindow& window);
  void find_row_patches(const std::uint8_t* symbols, std::size_t padded, const FlatWindow& window);
  FlatPatches store_patches(std::size_t columns, Arena& arena) const;

  std::vector<std::uint8_t> symbols_;
  std::vector<std::uint32_t> first_;
  std::vector<std::uint32_t> columns_;
  std::vector<std::int16_t> differences_;
};

Transcoder& thread_transcoder();

}  // namespace entrollm
