#include "product/grouped_tile.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

// The symbols of kStepColumns columns, of four rows or of four steps.
using FourWords = std::uint32_t __attribute__((vector_size(16)));
static_assert(kStepColumns == sizeof(std::uint32_t));

FourWords load_words(const std::uint8_t* from) {
  FourWords words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// Four steps of four rows, `stride` apart; the steps lie kVector apart.
void lay_out_square(const std::uint8_t* rows, std::size_t stride, std::uint8_t* steps) {
  const FourWords a = load_words(rows), b = load_words(rows + stride),
                  c = load_words(rows + 2 * stride), d = load_words(rows + 3 * stride);
  const FourWords ab_first = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                  ab_last = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                  cd_first = __builtin_shufflevector(c, d, 0, 4, 1, 5),
                  cd_last = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const FourWords out[] = {__builtin_shufflevector(ab_first, cd_first, 0, 1, 4, 5),
                           __builtin_shufflevector(ab_first, cd_first, 2, 3, 6, 7),
                           __builtin_shufflevector(ab_last, cd_last, 0, 1, 4, 5),
                           __builtin_shufflevector(ab_last, cd_last, 2, 3, 6, 7)};
  for (std::size_t i = 0; i < 4; ++i) std::memcpy(steps + i * kVector, &out[i], sizeof out[i]);
}

}  // namespace

void lay_out_tile(const std::uint8_t* symbols, std::size_t rows, std::size_t stride,
                  std::span<std::uint8_t> tile) {
  if (rows < kGroupedRows) std::fill(tile.begin(), tile.end(), std::uint8_t{0});
  const std::size_t steps = tile.size() / kVector;
  std::size_t step = 0;
  for (; rows == kGroupedRows && step + 4 <= steps; step += 4) {
    for (std::size_t row = 0; row < kGroupedRows; row += 4) {
      lay_out_square(symbols + row * stride + step * kStepColumns, stride,
                     tile.data() + step * kVector + row * kStepColumns);
    }
  }
  for (; step < steps; ++step) {
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(tile.data() + step * kVector + row * kStepColumns,
                  symbols + row * stride + step * kStepColumns, kStepColumns);
    }
  }
}

}  // namespace entrollm
