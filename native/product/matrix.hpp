// A matrix whose weights stay coded. Products and rows are computed from the stored bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <vector>

#include "format/code.hpp"
#include "format/geometry.hpp"
#include "kernels/kernels.hpp"
#include "threads/pool.hpp"

namespace entrollm {

struct CorruptBlock : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void throw_corrupt(std::size_t block);

// W[i, j] = (symbol[i, j] * scale[i] + offset[i]) * column_scale[j], where a trellis has half steps
// in the place of symbols. `scale` and `offset` have one
// entry, or one for each row; `offset` and `column_scale` may be empty.
struct Scales {
  std::span<const float> scale;
  std::span<const float> offset;
  std::span<const float> column_scale;

  float scale_of(std::size_t row) const { return scale[scale.size() == 1 ? 0 : row]; }
  float offset_of(std::size_t row) const {
    return offset.empty() ? 0.0f : offset[offset.size() == 1 ? 0 : row];
  }
};

// Throws std::invalid_argument unless each has a number of entries that it may have.
void check_scales(const Scales& scales, std::size_t rows, std::size_t columns);

// Throws std::invalid_argument unless a stored stream has `size` bytes and its padding. `name` is
// for the message.
void check_stream(std::span<const std::uint8_t> stored, std::size_t size, const char* name);

// Throws std::invalid_argument unless all rows are the matrix's.
void check_rows(const Geometry& geometry, std::span<const std::int64_t> rows);

// The values of a row from its symbols, one a column.
void dequantize_row(const Scales& scales, std::size_t row, std::span<const std::uint8_t> symbols,
                    float* out);

// A decoded block: (rows, columns) symbols; columns past the matrix's own are padding.
struct DecodedBlock {
  const std::uint8_t* symbols;
  std::size_t first_row;
  std::size_t rows;
  std::size_t first_column;
  std::size_t columns;
};

class CodedMatrix {
 public:
  // The spans must outlive the matrix, and `dense` and `sparse` include kSlack bytes of padding.
  // With a trellis, everything below has half steps where it says symbols, and only the code knows
  // the others. Throws std::invalid_argument if a size does not match the code and the geometry.
  CodedMatrix(Code code, Geometry geometry, std::span<const std::uint8_t> dense,
              std::span<const std::uint8_t> sparse, std::span<const std::uint16_t> sparse_sizes,
              Scales scales, bool has_trellis = false);

  // Not copyable, because the cascade points into the code's nodes. Moving leaves them in place.
  CodedMatrix(const CodedMatrix&) = delete;
  CodedMatrix& operator=(const CodedMatrix&) = delete;
  CodedMatrix(CodedMatrix&&) = default;
  CodedMatrix& operator=(CodedMatrix&&) = default;

  const Geometry& geometry() const { return geometry_; }
  const Scales& scales() const { return scales_; }
  const Code& code() const { return code_; }
  bool has_trellis() const { return has_trellis_; }

  // Decodes the blocks of row groups [begin, end) in order, on the calling thread. Returns a block
  // that does not decode, or SIZE_MAX.
  std::size_t for_blocks(std::size_t begin, std::size_t end,
                         const std::function<void(const DecodedBlock&)>& take) const;

  // Whether kernels decode the code in one pass with a product; it is then a chain of fields.
  bool has_cascade() const { return cascade_.levels != 0; }
  const Cascade& cascade() const { return cascade_; }
  // The stored bytes of row blocks [begin, end) of such a code, without activations, and the
  // calling thread's buffers.
  CascadeRun cascade_run(std::size_t begin, std::size_t end) const;

  // Writes the symbols of a row block, padded columns included, to out: (rows, padded columns).
  // Returns a block that does not decode, or SIZE_MAX.
  std::size_t decode_rows(std::size_t row_block, std::uint8_t* out) const;

  // Writes the symbols of rows [begin, end) to out, (end - begin, columns). Throws CorruptBlock.
  void decode(ThreadPool& pool, std::size_t begin, std::size_t end, std::uint8_t* out) const;

  // Writes the dequantized values of `rows` to out, (rows.size(), columns). Throws CorruptBlock.
  void dequantize(ThreadPool& pool, std::span<const std::int64_t> rows, float* out) const;

 private:
  friend class CodedProduct;
  friend class FlatMatrix;
  std::size_t max_block() const { return geometry_.block_rows * geometry_.block_columns; }
  // With a trellis, a thread decodes the parts of a row block in order.
  bool decode_part(std::size_t group, std::size_t part, class DecodeScratch& scratch) const;
  void add_trellis(std::size_t row_block, std::size_t part, class DecodeScratch& scratch) const;
  void copy_rows(std::size_t group, std::size_t part, std::size_t begin, std::size_t end,
                 const std::uint8_t* block, std::uint8_t* out) const;

  Code code_;
  Geometry geometry_;
  std::span<const std::uint8_t> dense_;
  std::span<const std::uint8_t> sparse_;
  std::vector<std::uint64_t>
      sparse_offsets_;           // bytes; blocks + 1 entries, or one if there are no lists
  std::size_t part_bytes_;       // dense bytes of a part of a full row block; the last may be short
  std::size_t row_block_bytes_;  // and of all its parts
  Scales scales_;
  bool has_trellis_;
  Cascade cascade_{};  // no levels if there is no fused product for the code
};

}  // namespace entrollm
