// Symbols become a segment of a flat matrix: the cheapest width and window, and patches outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/flat_encode.hpp"
#include "format/geometry.hpp"
#include "product/arena.hpp"
#include "product/flat_matrix.hpp"

namespace entrollm {

// Bytes that segments of `segment_rows` rows of a matrix take at most: those of 8-bit fields, which
// segments get whose patches would take more.
std::size_t most_flat_bytes(const Geometry& geometry, std::size_t segment_rows);

// Copies a segment of `row_bytes` bytes of fields a row to the arena.
FlatSegment copy_segment(const FlatSegment& segment, std::size_t row_bytes, Arena& arena);

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

  std::vector<std::uint8_t> symbols_;
  std::vector<std::uint32_t> first_;
  std::vector<FlatPatch> patches_;
};

Transcoder& thread_transcoder();

}  // namespace entrollm
