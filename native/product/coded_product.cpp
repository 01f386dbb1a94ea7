#include "product/coded_product.hpp"

#include <algorithm>
#include <cstring>

#include "codec/decode.hpp"

namespace entrollm {

CodedProduct::CodedProduct(const CodedMatrix& matrix, const Activations& x, const OutputRows& out)
    : matrix_(matrix),
      geometry_(matrix.geometry()),
      x_(x),
      output_(matrix.scales(), x, out),
      unit_(uses_panels(x.batch()) ? groups_of(2 * kPanelRows) : 1) {}

std::size_t CodedProduct::run(std::size_t begin, std::size_t end) const {
  begin *= unit_;
  end = std::min(geometry_.row_blocks(), end * unit_);
  if (begin >= end) return kNoBlock;
  const bool is_cascade = matrix_.has_cascade();
  if (uses_panels(x_.batch())) {
    const bool is_few = x_.batch() <= kMostFusedDigitGroups * kDigitGroup;
    return is_few && is_cascade ? run_groups(begin, end) : run_panels(begin, end);
  }
  return x_.batch() <= kMostColumns && is_cascade ? run_fused(begin, end) : run_tiles(begin, end);
}

std::size_t CodedProduct::run_fused(std::size_t begin, std::size_t end) const {
  const std::size_t first_row = begin * geometry_.block_rows;
  const std::size_t rows = geometry_.rows_between(begin, end);
  auto& sums = thread_buffers().sums;
  sums.resize(rows * x_.columns());
  CascadeRun run = matrix_.cascade_run(begin, end);
  run.digits = x_.group(0).digits;
  run.columns = x_.columns();
  const std::size_t done = kernels().cascade_product(run, sums.data());
  if (done != run.row_blocks * run.parts) return begin * run.parts + done;
  output_.write(first_row, rows, {sums.data(), x_.columns()}, 0, x_.batch());
  return kNoBlock;
}

// A few vectors: decodes and multiplies in one pass.
std::size_t CodedProduct::run_groups(std::size_t begin, std::size_t end) const {
  const std::size_t unit = groups_of(kPanelRows);
  const std::size_t size = 2 * panel_bytes(unit * geometry_.block_rows, row_vectors());
  std::uint8_t* panels = thread_buffers().reserve_panels(size);
  const PanelProduct product = new_panel_product(x_, panels, geometry_.rows_between(begin, end),
                                                 row_vectors(), 0, x_.batch());
  const CascadeRun run = matrix_.cascade_run(begin, end);
  const std::size_t done = kernels().cascade_digit_groups(
      run, {product.digits, product.digit_groups, unit, panels, product.sums});
  if (done != run.row_blocks * run.parts) return begin * run.parts + done;
  output_.write_panels(product, begin * geometry_.block_rows, 0);
  return kNoBlock;
}

// Many vectors: panels of many rows pass them in turns.
std::size_t CodedProduct::run_panels(std::size_t begin, std::size_t end) const {
  const std::size_t step = groups_of(kManyRows);
  std::uint8_t* panels =
      thread_buffers().reserve_panels(panel_bytes(step * geometry_.block_rows, row_vectors()));
  for (std::size_t group = begin; group < end; group += step) {
    const std::size_t last = std::min(end, group + step);
    const std::size_t bad = decode_panels(group, last, panels);
    if (bad != kNoBlock) return bad;
    for (std::size_t first = 0; first < x_.batch(); first += kPanelBatch) {
      const std::size_t batch = std::min(kPanelBatch, x_.batch() - first);
      const PanelProduct product = new_panel_product(
          x_, panels, geometry_.rows_between(group, last), row_vectors(), first, batch);
      kernels().panel_product(product);
      output_.write_panels(product, group * geometry_.block_rows, first);
    }
  }
  return kNoBlock;
}

// Decodes row groups; returns a block that does not decode, or kNoBlock.
std::size_t CodedProduct::decode_panels(std::size_t begin, std::size_t end,
                                        std::uint8_t* panels) const {
  const std::size_t parts = geometry_.parts();
  if (matrix_.has_cascade()) {
    const std::size_t done = kernels().cascade_panels(matrix_.cascade_run(begin, end), panels);
    return done == (end - begin) * parts ? kNoBlock : begin * parts + done;
  }
  DecodeScratch& scratch = thread_scratch(matrix_.code_, matrix_.max_block());
  for (std::size_t group = begin; group < end; ++group) {
    for (std::size_t part = 0; part < parts; ++part) {
      if (!matrix_.decode_part(group, part, scratch)) return group * parts + part;
      copy_to_panels(scratch.block(), (group - begin) * geometry_.block_rows,
                     geometry_.rows_in(group), part, panels);
    }
  }
  return kNoBlock;
}

// Copies a decoded block of `rows` rows, from `first_row` of the panels on.
void CodedProduct::copy_to_panels(const std::uint8_t* block, std::size_t first_row,
                                  std::size_t rows, std::size_t part, std::uint8_t* panels) const {
  const std::size_t first = part * geometry_.block_columns / kVector;
  const std::size_t vectors = geometry_.columns_in(part) / kVector;
  for (std::size_t row = 0; row < rows; ++row) {
    std::uint8_t* to = panels + panel_offset(first_row + row, first, row_vectors());
    for (std::size_t i = 0; i < vectors; ++i, block += kVector, to += kPanelStep) {
      std::memcpy(to, block, kVector);
    }
  }
}

std::size_t CodedProduct::run_tiles(std::size_t begin, std::size_t end) const {
  for (std::size_t first = 0; first < x_.batch(); first += kTileBatch) {
    const std::size_t batch = std::min(kTileBatch, x_.batch() - first);
    const std::size_t bad = run_batch(begin, end, first, batch);
    if (bad != kNoBlock) return bad;
  }
  return kNoBlock;
}

// Multiplies row groups [begin, end) with vectors [first, first + batch).
std::size_t CodedProduct::run_batch(std::size_t begin, std::size_t end, std::size_t first,
                                    std::size_t batch) const {
  // With a trellis, one row block at a time, whose parts are then decoded in order.
  const std::size_t step = matrix_.has_trellis() ? 1 : groups_of(kTileRows);
  DecodeScratch& scratch = thread_scratch(matrix_.code_, matrix_.max_block());
  ProductBuffers& buffers = thread_buffers();
  buffers.tile.resize(step * matrix_.max_block() + kSlack);
  for (std::size_t group = begin; group < end; group += step) {
    const std::size_t last = std::min(end, group + step);
    const std::size_t rows = geometry_.rows_between(group, last);
    buffers.sums.assign(rows * batch, 0);
    for (std::size_t part = 0; part < geometry_.parts(); ++part) {
      const std::size_t width = geometry_.columns_in(part);
      std::uint8_t* tile = buffers.tile.data();
      for (std::size_t i = group; i < last; ++i) {
        if (!matrix_.decode_part(i, part, scratch)) {
          return i * geometry_.parts() + part;
        }
        const std::size_t size = geometry_.rows_in(i) * width;
        std::memcpy(tile, scratch.block(), size);
        tile += size;
      }
      const std::size_t begin_column = part * geometry_.block_columns;
      multiply_tile({buffers.tile.data(), width, rows, begin_column, width}, x_, first, batch,
                    buffers.sums.data());
    }
    output_.write(group * geometry_.block_rows, rows, {buffers.sums.data(), batch}, first, batch);
  }
  return kNoBlock;
}

}  // namespace entrollm
