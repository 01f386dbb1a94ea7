// The matrix unit of newer processors (AMX). One instruction adds the products of 16 rows with 16
// columns, 64 bytes deep, to 32-bit sums. Internal linkage, as in avx512_vectors.hpp.
#pragma once

#include <immintrin.h>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, tiles 0 to 7 have 16 rows of 64 bytes. It uses assembly, because GCC 12 drops
// stores to the operand of the intrinsic (GCC bug 114098).
class Tiles {
 public:
  Tiles() {
    static constexpr TileConfig kConfig;
    asm volatile("ldtilecfg %0" : : "m"(kConfig));
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Bytes between the rows of a tile in memory.
inline constexpr int kTileStride = 64;

// The vectors of a row whose products a 32-bit sum can hold: 255 * 128 * 65536 < 2^31.
inline constexpr std::size_t kMaxVectors = 65536 / kVector;

using TileSums = std::int32_t[kPanelRows][2 * kDigitGroup];

// 256 * high + low for the eight activation vectors of a row of sums.
inline __m512i combine(const std::int32_t* row) {
  const auto* halves = reinterpret_cast<const __m256i*>(row);
  const __m512i high = _mm512_cvtepi32_epi64(_mm256_load_si256(halves));
  const __m512i low = _mm512_cvtepi32_epi64(_mm256_load_si256(halves + 1));
  return _mm512_add_epi64(_mm512_slli_epi64(high, 8), low);
}

// Adds the sums of a panel with a digit group to those of rows [row, end) of a product.
inline void add_sums(const TileSums& tile, const PanelProduct& product, std::size_t digit_group,
                     std::size_t row, std::size_t end) {
  const std::size_t rows = end - row < kPanelRows ? end - row : kPanelRows;
  std::int64_t* out = product.sums + (digit_group * product.rows + row) * kDigitGroup;
  for (std::size_t i = 0; i < rows; ++i, out += kDigitGroup) {
    _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_loadu_si512(out), combine(tile[i])));
  }
}

}  // namespace
}  // namespace entrollm
