// How the weights of one matrix are divided into blocks, and where each block's dense bytes lie.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "format/code.hpp"
#include "format/layout.hpp"

namespace entrollm {

inline constexpr std::size_t kMaxBlock = 8192;

// Bounds a dot product, whose 32-bit sums must not overflow: see reduce_digits() of AVX-512 and
// Sums of AVX2 and NEON.
inline constexpr std::size_t kMaxBlockColumns = 64 * kVector;

// The matrix is a column of row blocks, of `block_rows` rows each, which are decoded together. A
// row block is divided into parts of `block_columns` columns. One part of a row block is a block.
// Columns are padded to a multiple of kVector.
struct Geometry {
  std::size_t rows;
  std::size_t columns;
  std::size_t block_rows;
  std::size_t block_columns;

  // Throws std::invalid_argument unless the sizes fit together. All later arithmetic then fits in
  // 64 bits.
  void validate() const {
    constexpr std::size_t kLimit = std::size_t{1} << 31;
    constexpr std::size_t kMaxWeights = std::size_t{1} << 40;
    if (rows == 0 || columns == 0 || rows > kLimit || columns > kLimit) {
      throw std::invalid_argument("matrix sizes must be between 1 and 2^31");
    }
    if (rows > kMaxWeights / padded_columns()) {
      throw std::invalid_argument("the matrix has more than 2^40 weights");
    }
    if (block_rows == 0 || block_columns == 0 || block_columns % kVector != 0 ||
        block_columns > kMaxBlockColumns || block_rows > kMaxBlock / block_columns) {
      throw std::invalid_argument("block sizes are out of range");
    }
    if (block_columns > padded_columns()) {
      throw std::invalid_argument("block columns do not fit the matrix");
    }
  }

  std::size_t padded_columns() const { return (columns + kVector - 1) / kVector * kVector; }
  std::size_t row_blocks() const { return (rows + block_rows - 1) / block_rows; }
  std::size_t parts() const { return (padded_columns() + block_columns - 1) / block_columns; }
  std::size_t blocks() const { return row_blocks() * parts(); }
  std::size_t rows_in(std::size_t row_block) const {
    return std::min(block_rows, rows - row_block * block_rows);
  }
  // Rows of row blocks [begin, end), of which the last may be short.
  std::size_t rows_between(std::size_t begin, std::size_t end) const {
    return std::min(rows, end * block_rows) - begin * block_rows;
  }
  std::size_t columns_in(std::size_t part) const {
    return std::min(block_columns, padded_columns() - part * block_columns);
  }

  // Dense bytes of the parts before `part` in a row block of `rows_here` rows.
  std::size_t dense_before(const Code& code, std::size_t rows_here, std::size_t part) const {
    const std::size_t whole = std::min(part, parts() - 1);
    const std::size_t last = part == whole ? 0 : code.dense_size(rows_here * columns_in(whole));
    return whole * code.dense_size(rows_here * block_columns) + last;
  }
  std::size_t dense_size(const Code& code) const {
    const std::size_t last_rows = rows_in(row_blocks() - 1);
    return (row_blocks() - 1) * dense_before(code, block_rows, parts()) +
           dense_before(code, last_rows, parts());
  }
};

}  // namespace entrollm
