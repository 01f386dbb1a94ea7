#include "product/flat_product.hpp"

#include <algorithm>
#include <cstring>

namespace entrollm {
namespace {

constexpr std::size_t kUnitRows = 8;

// Rows whose sums a few vectors share a buffer for, in the first-level cache.
constexpr std::size_t kFewRows = 64;

// Symbols that fit the second-level cache together with digits, and their rows.
constexpr std::size_t kTileSymbols = 131072;
constexpr std::size_t kMostTileRows = 16;

}  // namespace

FlatProduct::FlatProduct(const FlatMatrix& matrix, const Activations& x, const OutputRows& out)
    : matrix_(matrix),
      x_(x),
      output_(matrix.scales(), x, out),
      unit_(uses_panels(x.batch()) ? 2 * kPanelRows : kUnitRows) {}

std::size_t FlatProduct::run(std::size_t begin, std::size_t end) const {
  begin *= unit_;
  end = std::min(matrix_.geometry().rows, end * unit_);
  if (uses_panels(x_.batch())) {
    run_panels(begin, end);
  } else if (x_.batch() <= kMostFlatVectors && !matrix_.has_trellis()) {
    for_segments(begin, end, kFewRows, [&](const Run& run) { run_few(run); });
  } else {
    const std::size_t most = kTileSymbols / matrix_.geometry().padded_columns();
    for_segments(begin, end, std::clamp<std::size_t>(most, 2, kMostTileRows),
                 [&](const Run& run) { run_tile(run); });
  }
  return kNoBlock;
}

// Cuts rows [begin, end) at the ends of segments and into runs of at most `most` rows.
template <class Body>
void FlatProduct::for_segments(std::size_t begin, std::size_t end, std::size_t most,
                               const Body& body) const {
  while (begin < end) {
    const FlatSegment& segment = matrix_.segments()[begin / matrix_.segment_rows()];
    const std::size_t row = begin % matrix_.segment_rows();
    const std::size_t count = std::min({most, end - begin, segment.rows - row});
    body(Run{segment, begin, row, count});
    begin += count;
  }
}

void FlatProduct::run_few(const Run& run) const {
  const FlatSegment& segment = run.segment;
  const FlatKernels& flat = *kernels().flat;
  const std::size_t columns = x_.columns();
  std::int64_t sums[kFewRows * kMostFlatVectors];
  if (segment.bits == kMaxFlatBits) {
    add_bytes(run, sums);
  } else {
    const std::size_t row_bytes = flat_row_bytes(matrix_.chunks(), segment.bits);
    const FlatRows rows{segment.fields + run.row * row_bytes, run.count, matrix_.chunks(),
                        segment.bits};
    fetch_patches(run);
    if (columns > kFlatGroup) std::fill_n(sums, run.count * columns, std::int64_t{0});
    for (std::size_t first = 0; first < x_.batch(); first += kFlatGroup) {
      flat.product(rows, x_.group(first), sums + first, columns);
    }
    FlatPatches patches = segment.patches;
    patches.first += run.row;
    flat.add_patches(patches, run.count, x_.interleaved_whole(), columns, sums);
  }
  for (std::size_t column = 0; segment.base != 0 && column < x_.batch(); ++column) {
    const std::int64_t base = segment.base * x_.sum(column);
    for (std::size_t row = 0; row < run.count; ++row) sums[row * columns + column] += base;
  }
  output_.write(run.first, run.count, {sums, columns}, 0, x_.batch());
}

// Requests what the products of the fields leave time for: where each row's patches begin, and the
// first of them, behind which the processor goes on by itself.
void FlatProduct::fetch_patches(const Run& run) const {
  constexpr std::size_t kLine = 64, kLines = 8;
  const auto* first = reinterpret_cast<const char*>(run.segment.patches.first + run.row);
  for (std::size_t at = 0; at < run.count * sizeof(std::uint32_t); at += kLine) {
    __builtin_prefetch(first + at);
  }
  const auto* words =
      reinterpret_cast<const char*>(run.segment.patches.words + run.segment.patches.first[run.row]);
  for (std::size_t line = 0; line < kLines; ++line) __builtin_prefetch(words + line * kLine);
}

// Fields of 8 bits are the symbols themselves.
void FlatProduct::add_bytes(const Run& run, std::int64_t* sums) const {
  const std::size_t padded = matrix_.geometry().padded_columns();
  const std::size_t batch = x_.batch(), columns = x_.columns();
  std::int64_t products[kFewRows * kMostFlatVectors] = {};
  for (std::size_t begin = 0; begin < padded; begin += kMaxBlockColumns) {
    const std::size_t width = std::min(kMaxBlockColumns, padded - begin);
    multiply_tile({run.segment.fields + run.row * padded + begin, padded, run.count, begin, width},
                  x_, 0, batch, products);
  }
  for (std::size_t row = 0; row < run.count; ++row) {
    std::copy_n(products + row * batch, batch, sums + row * columns);
  }
}

void FlatProduct::run_tile(const Run& run) const {
  const std::size_t padded = matrix_.geometry().padded_columns();
  ProductBuffers& buffers = thread_buffers();
  buffers.tile.resize(std::max(buffers.tile.size(), run.count * padded));
  matrix_.unpack(run.first, run.count, buffers.tile.data());
  for (std::size_t first = 0; first < x_.batch(); first += kTileBatch) {
    const std::size_t batch = std::min(kTileBatch, x_.batch() - first);
    buffers.sums.assign(run.count * batch, 0);
    for (std::size_t begin = 0; begin < padded; begin += kMaxBlockColumns) {
      const std::size_t width = std::min(kMaxBlockColumns, padded - begin);
      multiply_tile({buffers.tile.data() + begin, padded, run.count, begin, width}, x_, first,
                    batch, buffers.sums.data());
    }
    output_.write(run.first, run.count, {buffers.sums.data(), batch}, first, batch);
  }
}

void FlatProduct::run_panels(std::size_t begin, std::size_t end) const {
  std::uint8_t* panels = thread_buffers().reserve_panels(panel_bytes(kManyRows, matrix_.chunks()));
  for (std::size_t row = begin; row < end; row += kManyRows) {
    const std::size_t rows = std::min(kManyRows, end - row);
    for_segments(row, row + rows, kTileRows,
                 [&](const Run& run) { unpack_panels(run, run.first - row, panels); });
    for (std::size_t first = 0; first < x_.batch(); first += kPanelBatch) {
      const std::size_t batch = std::min(kPanelBatch, x_.batch() - first);
      const PanelProduct product =
          new_panel_product(x_, panels, rows, matrix_.chunks(), first, batch);
      kernels().panel_product(product);
      output_.write_panels(product, row, first);
    }
  }
}

// Symbols of a run, whose rows begin at row `at` of the panels.
void FlatProduct::unpack_panels(const Run& run, std::size_t at, std::uint8_t* panels) const {
  const std::size_t padded = matrix_.geometry().padded_columns();
  auto& tile = thread_buffers().tile;
  tile.resize(std::max(tile.size(), run.count * padded));
  matrix_.unpack(run.first, run.count, tile.data());
  for (std::size_t row = 0; row < run.count; ++row) {
    std::uint8_t* to = panels + panel_offset(at + row, 0, matrix_.chunks());
    const std::uint8_t* from = tile.data() + row * padded;
    for (std::size_t i = 0; i < matrix_.chunks(); ++i, from += kVector, to += kPanelStep) {
      std::memcpy(to, from, kVector);
    }
  }
}

}  // namespace entrollm
