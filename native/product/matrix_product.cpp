#include "product/matrix_product.hpp"

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

void multiply_tile(const Tile& tile, const Activations& x, std::size_t first, std::size_t batch,
                   std::int64_t* sums) {
  const Kernels& isa = kernels();
  std::size_t column = 0;
  for (; column + kColumnTile <= batch; column += kColumnTile) {
    Digits digits[kColumnTile];
    for (std::size_t i = 0; i < kColumnTile; ++i) {
      digits[i] = x.digits(first + column + i, tile.begin);
    }
    std::size_t row = 0;
    std::int64_t products[2 * kColumnTile];
    const auto add = [&](std::size_t to, const std::int64_t* from) {
      for (std::size_t i = 0; i < kColumnTile; ++i) sums[to * batch + column + i] += from[i];
    };
    if (isa.dot_tile_pair != nullptr) {
      for (; row + 2 <= tile.rows; row += 2) {
        isa.dot_tile_pair(tile.symbols + row * tile.stride, tile.stride, digits, tile.width,
                          products);
        add(row, products);
        add(row + 1, products + kColumnTile);
      }
    }
    for (; row < tile.rows; ++row) {
      isa.dot_tile(tile.symbols + row * tile.stride, digits, tile.width, products);
      add(row, products);
    }
  }
  for (; column < batch; ++column) {
    const Digits digits = x.digits(first + column, tile.begin);
    for (std::size_t row = 0; row < tile.rows; ++row) {
      sums[row * batch + column] += isa.dot(tile.symbols + row * tile.stride, digits, tile.width);
    }
  }
}

}  // namespace entrollm
