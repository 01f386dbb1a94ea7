// Rows of symbols as tiles of scale-group products; see GroupedTile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace entrollm {

// Writes at most kGroupedRows rows of symbols, `stride` apart, as the steps of a tile; missing rows
// become zeros. Each row has kStepColumns symbols for each of the tile's steps.
void lay_out_tile(const std::uint8_t* symbols, std::size_t rows, std::size_t stride,
                  std::span<std::uint8_t> tile);

}  // namespace entrollm
