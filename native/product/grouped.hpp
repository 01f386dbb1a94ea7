// Matrices whose scales belong to groups of columns, and their products.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/grouped_kernels.hpp"
#include "product/arena.hpp"
#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// The scales of a matrix: column j is in group j / size.
struct GroupScales {
  std::size_t size;  // at least 1
  GroupTerms terms;
  std::span<const float> values;  // 256: what a symbol stands for; empty if it stands for itself
};

// Reads its symbols from a coded matrix, or from a copy in the flat layout. What it is made from
// must outlive it; after flatten(), the coded matrix's streams need not.
class GroupedMatrix {
 public:
  // Throws std::invalid_argument when the scales do not fit the matrix.
  GroupedMatrix(const CodedMatrix& coded, const GroupScales& scales);

  // Transcodes to fields of one width, or to numbers of at most 16 symbols if those are narrower;
  // does nothing where the product would not use them. Throws CorruptBlock when a block does not
  // decode.
  void flatten(ThreadPool& pool);

  // Whether the kernels of group scales take the matrix.
  bool can_flatten() const { return is_grouped_size(scales_.size) && scales_.values.empty(); }
  bool is_flat() const { return bits_ != 0; }
  std::size_t size_bytes() const { return fields_ ? fields_->used() : 0; }

  const CodedMatrix& coded() const { return coded_; }
  const Geometry& geometry() const { return coded().geometry(); }
  const GroupScales& scales() const { return scales_; }
  int bits() const { return bits_; }
  int symbol_bits() const { return symbol_bits_; }
  // The symbols by number; null if fields are symbols.
  const std::uint8_t* table() const { return has_table_ ? table_.data() : nullptr; }
  // Tiles one behind the other, the last one filled up with rows of zeros.
  const std::uint8_t* tile_fields(std::size_t tile) const {
    return fields_begin_ + tile * tile_bytes_;
  }
  std::size_t tiles() const { return (geometry().rows - 1) / kGroupedRows + 1; }
  std::size_t steps() const { return (geometry().columns - 1) / kStepColumns + 1; }

 private:
  const CodedMatrix& coded_;
  GroupScales scales_;
  int bits_ = 0;  // 0 while coded
  int symbol_bits_ = 0;
  bool has_table_ = false;
  std::array<std::uint8_t, kGroupedTable> table_{};
  std::size_t tile_bytes_ = 0;
  std::optional<Arena> fields_;
  const std::uint8_t* fields_begin_ = nullptr;
};

// y[b, :] = the products of all matrices with x[b, :], side by side; x is (batch, columns) and y
// (batch, sum of rows), both row-major.
//
// Activations are rounded as for `multiply`. Sums over a group are exact, those over groups are in
// float32 in the order that kernels/grouped_kernels.hpp defines; for group sizes without kernels
// and for tables of values they are in double precision and in order. Results do not depend on the
// batch, the threads, the instruction set, or on whether a matrix is flat. Throws CorruptBlock when
// a block does not decode.
void multiply_grouped(ThreadPool& pool, std::span<const GroupedMatrix* const> matrices,
                      const float* x, std::size_t batch, float* y);

}  // namespace entrollm
