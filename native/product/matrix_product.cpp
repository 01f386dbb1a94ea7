#include "product/matrix_product.hpp"

#include <algorithm>

namespace entrollm {

ProductBuffers& thread_buffers() {
  thread_local ProductBuffers buffers;
  return buffers;
}

PanelProduct new_panel_product(const Activations& x, const std::uint8_t* panels, std::size_t rows,
                               std::size_t vectors, std::size_t first, std::size_t batch) {
  const std::size_t groups = (batch + kDigitGroup - 1) / kDigitGroup;
  auto& sums = thread_buffers().sums;
  sums.assign(groups * rows * kDigitGroup, 0);
  return {panels, rows, vectors, x.digit_groups(first / kDigitGroup), groups, sums.data()};
}

namespace {

// Adds the products with kColumnTile vectors to sums, rows of `stride`.
void multiply_columns(const Tile& tile, const Digits (&digits)[kColumnTile], std::int64_t* sums,
                      std::size_t stride) {
  const Kernels& isa = kernels();
  std::int64_t products[kMostDotRows * kColumnTile];
  const auto add = [&](std::size_t row, const std::int64_t* from) {
    for (std::size_t i = 0; i < kColumnTile; ++i) sums[row * stride + i] += from[i];
  };
  std::size_t row = 0;
  if (isa.dot_tile_rows != nullptr) {
    for (; row + isa.dot_rows <= tile.rows; row += isa.dot_rows) {
      isa.dot_tile_rows(tile.symbols + row * tile.stride, tile.stride, digits, tile.width,
                        products);
      for (std::size_t i = 0; i < isa.dot_rows; ++i) add(row + i, products + i * kColumnTile);
    }
  }
  for (; row < tile.rows; ++row) {
    isa.dot_tile(tile.symbols + row * tile.stride, digits, tile.width, products);
    add(row, products);
  }
}

}  // namespace

void multiply_tile(const Tile& tile, const Activations& x, std::size_t first, std::size_t batch,
                   std::int64_t* sums) {
  // The digits of kColumnTile vectors stay in the first-level cache while the rows pass.
  const std::size_t cuts = (tile.width - 1) / kTileColumns + 1;
  const std::size_t widest = (tile.width / kVector + cuts - 1) / cuts * kVector;
  for (std::size_t begin = 0; begin < tile.width; begin += widest) {
    const Tile cut{tile.symbols + begin, tile.stride, tile.rows, tile.begin + begin,
                   std::min(widest, tile.width - begin)};
    std::size_t column = 0;
    for (; column + kColumnTile <= batch; column += kColumnTile) {
      Digits digits[kColumnTile];
      for (std::size_t i = 0; i < kColumnTile; ++i) {
        digits[i] = x.digits(first + column + i, cut.begin);
      }
      multiply_columns(cut, digits, sums + column, batch);
    }
    for (; column < batch; ++column) {
      const Digits digits = x.digits(first + column, cut.begin);
      for (std::size_t row = 0; row < tile.rows; ++row) {
        sums[row * batch + column] +=
            kernels().dot(cut.symbols + row * tile.stride, digits, cut.width);
      }
    }
  }
}

}  // namespace entrollm
