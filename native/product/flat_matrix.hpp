// A matrix in the flat form, in memory: fields of one width for each segment of rows, and patches
// where a weight lies outside. It has the same integers, products and rows as the coded matrix that
// it is made from.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format/flat.hpp"
#include "product/arena.hpp"
#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// Consecutive rows: symbol[i, j] = field[i, j] + base + the difference of a patch at (i, j).
struct FlatSegment {
  std::size_t rows;
  int bits;
  std::uint8_t base;           // base + 2^bits - 1 is at most 255
  const std::uint8_t* fields;  // rows * flat_row_bytes
  FlatPatches patches;         // columns below the matrix's
};

class FlatMatrix {
 public:
  // Transcodes a matrix, whose scales must outlive the result; its streams need not. Throws
  // CorruptBlock when a block does not decode.
  FlatMatrix(ThreadPool& pool, const CodedMatrix& matrix);

  const Geometry& geometry() const { return geometry_; }
  const Scales& scales() const { return scales_; }
  std::size_t chunks() const { return geometry_.padded_columns() / kVector; }

  // Segment i holds the rows from i * segment_rows() on.
  std::span<const FlatSegment> segments() const { return segments_; }
  std::size_t segment_rows() const { return segment_rows_; }

  // Bytes of fields and patches.
  std::size_t size_bytes() const { return arena_.used(); }
  // Rows of each width, by bits.
  std::array<std::size_t, kMaxFlatBits + 1> rows_by_bits() const;
  std::size_t patches() const;

  // Symbols of `count` rows of one segment, from row `first` of the matrix on, into rows of
  // geometry().padded_columns() bytes.
  void unpack(std::size_t first, std::size_t count, std::uint8_t* out) const;

  // As CodedMatrix has them, but nothing can be corrupt.
  void decode(ThreadPool& pool, std::size_t begin, std::size_t end, std::uint8_t* out) const;
  void dequantize(ThreadPool& pool, std::span<const std::int64_t> rows, float* out) const;

 private:
  Geometry geometry_;
  Scales scales_;
  std::size_t segment_rows_;
  Arena arena_;
  std::vector<FlatSegment> segments_;
};

}  // namespace entrollm
