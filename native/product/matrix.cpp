#include "product/matrix.hpp"

#include <atomic>
#include <cstring>
#include <string>

#include "codec/decode.hpp"
#include "kernels/kernels.hpp"
#include "product/activations.hpp"

namespace entrollm {
namespace {

void check_scale(std::span<const float> values, std::size_t rows, const char* name) {
  if (values.size() != 1 && values.size() != rows) {
    throw std::invalid_argument(std::string(name) + " needs one entry or one a row");
  }
}

// The code as a chain of fields. It has no levels if fused products cannot run the code.
Cascade make_cascade(const Code& code) {
  Cascade cascade{};
  cascade.low_bits = code.low_bits();
  if (cascade.low_bits > kMaxCascadeLowBits || code.root().bits == kRawBits) return Cascade{};
  int index = 0;
  while (index >= 0) {
    const Node& node = code.nodes()[static_cast<std::size_t>(index)];
    if (node.kind != NodeKind::kField || cascade.levels == kMaxLevels) return Cascade{};
    cascade.bits[cascade.levels] = node.bits;
    cascade.tables[cascade.levels] = node.table.data();
    ++cascade.levels;
    index = node.left;
  }
  return cascade;
}

}  // namespace

void check_scales(const Scales& scales, std::size_t rows, std::size_t columns) {
  check_scale(scales.scale, rows, "scale");
  if (!scales.offset.empty()) check_scale(scales.offset, rows, "offset");
  if (!scales.column_scale.empty() && scales.column_scale.size() != columns) {
    throw std::invalid_argument("column_scale needs one entry a column");
  }
}

// The padding is part of the stream, since wide loads read past its last block.
void check_stream(std::span<const std::uint8_t> stored, std::size_t size, const char* name) {
  if (stored.size() == stored_bytes(size)) return;
  throw std::invalid_argument("the " + std::string(name) + " stream has " +
                              std::to_string(stored.size()) + " bytes, expected " +
                              std::to_string(stored_bytes(size)));
}

void throw_corrupt(std::size_t block) {
  throw CorruptBlock("block " + std::to_string(block) + " does not decode to its stated length");
}

void check_rows(const Geometry& geometry, std::span<const std::int64_t> rows) {
  for (const std::int64_t row : rows) {
    if (row < 0 || static_cast<std::size_t>(row) >= geometry.rows) {
      throw std::invalid_argument("row index out of range");
    }
  }
}

void dequantize_row(const Scales& scales, std::size_t row, std::span<const std::uint8_t> symbols,
                    float* out) {
  const float scale = scales.scale_of(row);
  const bool shifted = !scales.offset.empty();
  const float offset = scales.offset_of(row);
  for (std::size_t j = 0; j < symbols.size(); ++j) {
    // Rounded after the product and after the sum: the build forbids contraction to an FMA.
    float value = static_cast<float>(symbols[j]) * scale;
    if (shifted) value = value + offset;
    if (!scales.column_scale.empty()) value = value * scales.column_scale[j];
    out[j] = value;
  }
}

CodedMatrix::CodedMatrix(Code code, Geometry geometry, std::span<const std::uint8_t> dense,
                         std::span<const std::uint8_t> sparse,
                         std::span<const std::uint16_t> sparse_sizes, Scales scales,
                         bool has_trellis)
    : code_(std::move(code)),
      geometry_(geometry),
      dense_(dense),
      sparse_(sparse),
      scales_(scales),
      has_trellis_(has_trellis) {
  geometry_.validate();
  check_scales(scales, geometry_.rows, geometry_.columns);
  check_stream(dense, geometry_.dense_size(code_), "dense");
  const std::size_t blocks = code_.has_sparse() ? geometry_.blocks() : 0;
  if (sparse_sizes.size() != blocks) {
    throw std::invalid_argument("there are " + std::to_string(sparse_sizes.size()) +
                                " sparse block sizes, expected " + std::to_string(blocks));
  }
  sparse_offsets_.assign(blocks + 1, 0);
  for (std::size_t i = 0; i < blocks; ++i) {
    sparse_offsets_[i + 1] = sparse_offsets_[i] + sparse_sizes[i];
  }
  check_stream(sparse, sparse_offsets_.back(), "sparse");
  part_bytes_ = code_.dense_size(geometry_.block_rows * geometry_.block_columns);
  row_block_bytes_ = geometry_.dense_before(code_, geometry_.block_rows, geometry_.parts());
  if (kernels().cascade_product != nullptr && !has_trellis_) cascade_ = make_cascade(code_);
}

bool CodedMatrix::decode_part(std::size_t row_block, std::size_t part,
                              DecodeScratch& scratch) const {
  const std::size_t parts = geometry_.parts();
  const std::size_t rows = geometry_.rows_in(row_block);
  const std::size_t before =
      rows == geometry_.block_rows ? part * part_bytes_ : geometry_.dense_before(code_, rows, part);
  const std::uint8_t* dense = dense_.data() + row_block * row_block_bytes_ + before;
  const std::size_t block = code_.has_sparse() ? row_block * parts + part : 0;
  const auto sparse = code_.has_sparse()
                          ? sparse_.subspan(sparse_offsets_[block],
                                            sparse_offsets_[block + 1] - sparse_offsets_[block])
                          : std::span<const std::uint8_t>();
  if (decode_block(kernels(), code_, dense, sparse, rows * geometry_.columns_in(part), scratch) !=
      BlockStatus::kOk) {
    return false;
  }
  if (has_trellis_) add_trellis(row_block, part, scratch);
  return true;
}

void CodedMatrix::add_trellis(std::size_t row_block, std::size_t part,
                              DecodeScratch& scratch) const {
  const std::size_t width = geometry_.columns_in(part);
  std::vector<TrellisState>& states = scratch.trellis();
  if (part == 0) states.assign(geometry_.rows_in(row_block), {});
  for (std::size_t row = 0; row < states.size(); ++row) {
    make_half_steps(scratch.block() + row * width, width, states[row]);
  }
}

std::size_t CodedMatrix::for_blocks(std::size_t begin, std::size_t end,
                                    const std::function<void(const DecodedBlock&)>& take) const {
  DecodeScratch& scratch = thread_scratch(code_, max_block());
  for (std::size_t row_block = begin; row_block < end; ++row_block) {
    for (std::size_t part = 0; part < geometry_.parts(); ++part) {
      if (!decode_part(row_block, part, scratch)) return row_block * geometry_.parts() + part;
      take({scratch.block(), row_block * geometry_.block_rows, geometry_.rows_in(row_block),
            part * geometry_.block_columns, geometry_.columns_in(part)});
    }
  }
  return SIZE_MAX;
}

CascadeRun CodedMatrix::cascade_run(std::size_t begin, std::size_t end) const {
  const std::size_t parts = geometry_.parts();
  DecodeScratch& scratch = thread_scratch(code_, max_block());
  CascadeRun run{};
  run.code = &cascade_;
  run.dense = dense_.data() + begin * row_block_bytes_;
  run.sparse = sparse_.data();
  run.sparse_offsets = sparse_offsets_.data() + (code_.has_sparse() ? begin * parts : 0);
  run.row_blocks = end - begin;
  run.parts = parts;
  run.block_rows = geometry_.block_rows;
  run.last_rows = geometry_.rows_in(end - 1);
  run.block_columns = geometry_.block_columns;
  run.last_columns = geometry_.columns_in(parts - 1);
  run.buffer = scratch.block();
  run.lists = scratch.lists();
  return run;
}

std::size_t CodedMatrix::decode_rows(std::size_t row_block, std::uint8_t* out) const {
  DecodeScratch& scratch = thread_scratch(code_, max_block());
  const std::size_t rows = geometry_.rows_in(row_block);
  for (std::size_t part = 0; part < geometry_.parts(); ++part) {
    if (!decode_part(row_block, part, scratch)) return row_block * geometry_.parts() + part;
    const std::size_t width = geometry_.columns_in(part);
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(out + row * geometry_.padded_columns() + part * geometry_.block_columns,
                  scratch.block() + row * width, width);
    }
  }
  return SIZE_MAX;
}

void CodedMatrix::copy_rows(std::size_t row_block, std::size_t part, std::size_t begin,
                            std::size_t end, const std::uint8_t* block, std::uint8_t* out) const {
  const std::size_t width = geometry_.columns_in(part);
  const std::size_t first_column = part * geometry_.block_columns;
  const std::size_t filled = std::min(width, geometry_.columns - first_column);
  for (std::size_t row = 0; row < geometry_.rows_in(row_block); ++row) {
    const std::size_t i = row_block * geometry_.block_rows + row;
    if (i < begin || i >= end) continue;
    std::memcpy(out + (i - begin) * geometry_.columns + first_column, block + row * width, filled);
  }
}

void CodedMatrix::decode(ThreadPool& pool, std::size_t begin, std::size_t end,
                         std::uint8_t* out) const {
  if (begin > end || end > geometry_.rows) throw std::invalid_argument("rows out of range");
  if (begin == end) return;
  const std::size_t first = begin / geometry_.block_rows;
  const std::size_t last = (end - 1) / geometry_.block_rows + 1;
  const std::size_t parts = geometry_.parts();
  std::atomic<std::size_t> bad_block{SIZE_MAX};
  pool.run(last - first, [&](std::size_t task, std::size_t) {
    const std::size_t row_block = first + task;
    DecodeScratch& scratch = thread_scratch(code_, max_block());
    for (std::size_t part = 0; part < parts; ++part) {
      if (!decode_part(row_block, part, scratch)) {
        bad_block = row_block * parts + part;
        return;
      }
      copy_rows(row_block, part, begin, end, scratch.block(), out);
    }
  });
  if (bad_block != SIZE_MAX) throw_corrupt(bad_block);
}

void CodedMatrix::dequantize(ThreadPool& pool, std::span<const std::int64_t> rows,
                             float* out) const {
  check_rows(geometry_, rows);
  constexpr std::size_t kRowsPerTask = 64;
  std::atomic<std::size_t> bad_block{SIZE_MAX};
  pool.run((rows.size() + kRowsPerTask - 1) / kRowsPerTask, [&](std::size_t task, std::size_t) {
    // Neighbouring rows usually share a row block, so that the last one is kept decoded.
    std::vector<std::uint8_t> symbols(geometry_.block_rows * geometry_.columns);
    std::size_t decoded = SIZE_MAX;
    DecodeScratch& scratch = thread_scratch(code_, max_block());
    const std::size_t end = std::min(rows.size(), (task + 1) * kRowsPerTask);
    for (std::size_t n = task * kRowsPerTask; n < end; ++n) {
      const auto i = static_cast<std::size_t>(rows[n]);
      const std::size_t row_block = i / geometry_.block_rows;
      const std::size_t begin = row_block * geometry_.block_rows;
      for (std::size_t part = 0; row_block != decoded && part < geometry_.parts(); ++part) {
        if (!decode_part(row_block, part, scratch)) {
          bad_block = row_block * geometry_.parts() + part;
          return;
        }
        copy_rows(row_block, part, begin, begin + geometry_.rows_in(row_block), scratch.block(),
                  symbols.data());
      }
      decoded = row_block;
      dequantize_row(scales_, i,
                     {symbols.data() + (i - begin) * geometry_.columns, geometry_.columns},
                     out + n * geometry_.columns);
    }
  });
  if (bad_block != SIZE_MAX) throw_corrupt(bad_block);
}

}  // namespace entrollm
