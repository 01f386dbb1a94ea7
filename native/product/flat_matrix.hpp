// A matrix in the flat form: fields of one width for each segment of rows, and patches where a
// weight lies outside. It is read in place from its stored bytes or from a copy of them, or
// transcoded from a coded matrix, whose integers, products and rows it then has. Only stored fields
// may have a trellis; what is copied or transcoded from it has the half steps as its symbols.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "format/flat.hpp"
#include "format/flat_streams.hpp"
#include "product/arena.hpp"
#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// Consecutive rows: symbol[i, j] = field[i, j] + base + the differences of the patches at (i, j).
struct FlatSegment {
  std::size_t rows;
  int bits;
  std::uint8_t base;           // base + 2^bits - 1 is at most 255
  const std::uint8_t* fields;  // rows * flat_row_bytes
  FlatPatches patches;
};

class FlatMatrix {
 public:
  // Transcodes a matrix, whose scales must outlive the result; its streams need not. Throws
  // CorruptBlock when a block does not decode.
  FlatMatrix(ThreadPool& pool, const CodedMatrix& matrix);

  // Reads stored streams in place; they and the scales must outlive the matrix. Throws
  // std::invalid_argument if a size does not match, a window is out of range, or a patch lies
  // outside of its row.
  FlatMatrix(std::size_t rows, std::size_t columns, const FlatStreams& streams, Scales scales,
             bool has_trellis = false);

  // Copies a matrix to memory of its own, where it has huge pages; the scales must outlive the
  // copy. Half steps of a trellis get fields of their own.
  FlatMatrix(ThreadPool& pool, const FlatMatrix& stored);

  const Geometry& geometry() const { return geometry_; }
  const Scales& scales() const { return scales_; }
  std::size_t chunks() const { return geometry_.padded_columns() / kVector; }

  // Segment i holds the rows from i * segment_rows() on.
  std::span<const FlatSegment> segments() const { return segments_; }
  std::size_t segment_rows() const { return segment_rows_; }

  // Whether rows must be unpacked to their half steps before they are multiplied.
  bool has_trellis() const { return has_trellis_; }

  // Bytes of memory that it holds itself.
  std::size_t size_bytes() const {
    return (arena_ ? arena_->used() : 0) + first_.size() * sizeof(first_[0]);
  }
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
  std::size_t row_bytes(const FlatSegment& segment) const {
    return flat_row_bytes(chunks(), segment.bits);
  }
  template <class Fill>
  void transcode(ThreadPool& pool, const Fill& fill);
  void copy(ThreadPool& pool, const FlatMatrix& stored);
  void settle(ThreadPool& pool);
  void place(const FlatStreams& streams);
  std::size_t check_row(const FlatPatch* words, std::size_t size) const;

  Geometry geometry_;
  Scales scales_;
  std::size_t segment_rows_;
  bool has_trellis_ = false;
  std::optional<Arena> arena_;        // of a transcoded matrix or a copy
  std::vector<std::uint32_t> first_;  // where the patches of stored rows begin in their segment
  std::vector<FlatSegment> segments_;
};

}  // namespace entrollm
