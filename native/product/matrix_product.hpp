// What products of all forms of a matrix share: how they are cut into tasks, the buffers of a
// thread, and products of decoded rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "product/activations.hpp"
#include "product/output.hpp"

namespace entrollm {

inline constexpr std::size_t kNoBlock = SIZE_MAX;

// One matrix times the activations.
class MatrixProduct {
 public:
  virtual ~MatrixProduct() = default;

  // Runs of rows that tasks consist of.
  virtual std::size_t units() const = 0;

  // Multiplies units [begin, end). Returns a block that does not decode, or kNoBlock.
  virtual std::size_t run(std::size_t begin, std::size_t end) const = 0;
};

// Rows that are decoded before they are multiplied with a batch, and the vectors of the batch that
// share one decoding: the tile fits the first-level cache and the vectors the second.
inline constexpr std::size_t kTileRows = 8;
inline constexpr std::size_t kTileBatch = 128;

// Columns of a tile that are multiplied at a time.
inline constexpr std::size_t kTileColumns = 1024;
static_assert(kTileColumns <= kDotRowsColumns);

// Where there are products of panels and many vectors: panels of so many rows stay in the
// second-level cache while the vectors pass, and so do the sums of so many vectors at a time.
inline constexpr std::size_t kManyRows = 8 * kPanelRows;
inline constexpr std::size_t kPanelBatch = 64;

// Whether products with `batch` vectors decode to panels: two vectors are faster without.
inline bool uses_panels(std::size_t batch) {
  return batch > 2 && kernels().panel_product != nullptr;
}

// A thread's buffers, kept between products.
struct ProductBuffers {
  std::vector<std::uint8_t> tile;  // decoded rows
  std::vector<std::int64_t> sums;  // (rows of a task or tile, batch)
  AlignedArray<std::uint8_t> panels{0};

  std::uint8_t* reserve_panels(std::size_t size) {
    if (panels.size() < size) panels = AlignedArray<std::uint8_t>(size);
    return panels.data();
  }
};

ProductBuffers& thread_buffers();

// Panels times vectors [first, first + batch), with zeroed sums in the thread's buffer; `first` is
// a multiple of kDigitGroup.
PanelProduct new_panel_product(const Activations& x, const std::uint8_t* panels, std::size_t rows,
                               std::size_t vectors, std::size_t first, std::size_t batch);

// Decoded rows, `stride` bytes apart, of columns [begin, begin + width); a row has at most
// kMaxBlockColumns of them.
struct Tile {
  const std::uint8_t* symbols;
  std::size_t stride;
  std::size_t rows;
  std::size_t begin;
  std::size_t width;
};

// Adds the products of a tile with vectors [first, first + batch) to sums (rows, batch).
void multiply_tile(const Tile& tile, const Activations& x, std::size_t first, std::size_t batch,
                   std::int64_t* sums);

}  // namespace entrollm
