// The kernels of lossless matrices, written once over the vectors of an instruction set. L has
//
//   kFloats                      floats of a register: 4, 8 or 16
//   kMostVectors                 activation vectors that share the decoding of a weight
//   kPanelVectors                activation vectors whose products with four rows fit the registers
//   Floats, load(p), store(p, v)
//   add_product(sum, a, b)       sum + a * b, rounded once
//   weights<Format>(high, low, out)   the weights of 4 * kFloats columns, one register for each run
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/lossless_kernels.hpp"

namespace entrollm {
namespace {  // every instruction set compiles its own

void split_words(const std::uint16_t* words, std::size_t count, std::uint8_t* high,
                 std::uint8_t* low) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto rotated = static_cast<std::uint16_t>(words[i] << 1 | words[i] >> 15);
    high[i] = static_cast<std::uint8_t>(rotated >> 8);
    low[i] = static_cast<std::uint8_t>(rotated);
  }
}

void join_words(const std::uint8_t* high, const std::uint8_t* low, std::size_t count,
                std::uint16_t* words) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto rotated = static_cast<std::uint16_t>(high[i] << 8 | low[i]);
    words[i] = static_cast<std::uint16_t>(rotated >> 1 | rotated << 15);
  }
}

template <class L, WordFormat Format, std::size_t Vectors>
[[gnu::always_inline]] inline void add_vectors(const LosslessRow& row, std::size_t first) {
  using Floats = typename L::Floats;
  constexpr std::size_t kSteps = kLosslessRun / L::kFloats;
  Floats sums[Vectors][2 * kSteps];
  const float* x = row.x + first * row.x_stride;
  float* lanes = row.lanes + first * kLosslessLanes;
  for (std::size_t v = 0; v < Vectors; ++v) {
    for (std::size_t i = 0; i < 2 * kSteps; ++i) {
      sums[v][i] = L::load(lanes + v * kLosslessLanes + i * L::kFloats);
    }
  }
  // The low bytes come from memory and the high ones from a cache.
  constexpr std::size_t kAheadBytes = 8192;
  for (std::size_t chunk = 0; chunk < row.chunks; ++chunk, x += kVector) {
    const std::uint8_t* high = row.high + chunk * kVector;
    const std::uint8_t* low = row.low + chunk * kVector;
    __builtin_prefetch(low + kAheadBytes, 0, 2);
    for (std::size_t step = 0; step < kSteps; ++step) {
      Floats weights[4];
      L::template weights<Format>(high + step * 4 * L::kFloats, low + step * 4 * L::kFloats,
                                  weights);
      for (std::size_t run = 0; run < 4; ++run) {
        const float* at = x + run * kLosslessRun + step * L::kFloats;
        for (std::size_t v = 0; v < Vectors; ++v) {
          Floats& sum = sums[v][run % 2 * kSteps + step];
          sum = L::add_product(sum, weights[run], L::load(at + v * row.x_stride));
        }
      }
    }
  }
  for (std::size_t v = 0; v < Vectors; ++v) {
    for (std::size_t i = 0; i < 2 * kSteps; ++i) {
      L::store(lanes + v * kLosslessLanes + i * L::kFloats, sums[v][i]);
    }
  }
}

template <class L, WordFormat Format>
void add_row(const LosslessRow& row) {
  std::size_t first = 0;
  if constexpr (L::kMostVectors >= 8) {
    for (; first + 8 <= row.vectors; first += 8) add_vectors<L, Format, 8>(row, first);
  }
  if constexpr (L::kMostVectors >= 4) {
    for (; first + 4 <= row.vectors; first += 4) add_vectors<L, Format, 4>(row, first);
  }
  for (; first + 2 <= row.vectors; first += 2) add_vectors<L, Format, 2>(row, first);
  if (first < row.vectors) add_vectors<L, Format, 1>(row, first);
}

template <class L, WordFormat Format>
void expand_row(const std::uint8_t* high, const std::uint8_t* low, std::size_t chunks,
                float* weights) {
  constexpr std::size_t kSteps = kLosslessRun / L::kFloats;
  for (std::size_t chunk = 0; chunk < chunks; ++chunk, weights += kVector) {
    for (std::size_t step = 0; step < kSteps; ++step) {
      const std::size_t at = chunk * kVector + step * 4 * L::kFloats;
      typename L::Floats runs[4];
      L::template weights<Format>(high + at, low + at, runs);
      for (std::size_t run = 0; run < 4; ++run) {
        L::store(weights + run * kLosslessRun + step * L::kFloats, runs[run]);
      }
    }
  }
}

// Some rows and vectors of a panel. Lanes do not depend on each other: one register of them at a
// time leaves registers for more rows and vectors.
template <class L, std::size_t Rows, std::size_t Vectors>
[[gnu::always_inline]] inline void add_tile(const LosslessPanel& panel, std::size_t row,
                                            std::size_t vector) {
  const float* weights = panel.weights + row * panel.stride;
  const float* x = panel.x + vector * panel.x_stride;
  for (std::size_t lane = 0; lane < kLosslessLanes; lane += L::kFloats) {
    typename L::Floats sums[Rows][Vectors];
    const auto lanes = [&](std::size_t r, std::size_t v) {
      return panel.lanes + ((row + r) * panel.vectors + vector + v) * kLosslessLanes + lane;
    };
    for (std::size_t r = 0; r < Rows; ++r) {
      for (std::size_t v = 0; v < Vectors; ++v) sums[r][v] = L::load(lanes(r, v));
    }
    // A chunk has two runs for each lane.
    for (std::size_t at = lane; at < panel.chunks * kVector; at += kLosslessLanes) {
      typename L::Floats w[Rows];
      for (std::size_t r = 0; r < Rows; ++r) w[r] = L::load(weights + r * panel.stride + at);
      for (std::size_t v = 0; v < Vectors; ++v) {
        const typename L::Floats factor = L::load(x + v * panel.x_stride + at);
        for (std::size_t r = 0; r < Rows; ++r) {
          sums[r][v] = L::add_product(sums[r][v], w[r], factor);
        }
      }
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      for (std::size_t v = 0; v < Vectors; ++v) L::store(lanes(r, v), sums[r][v]);
    }
  }
}

template <class L, std::size_t Rows>
[[gnu::always_inline]] inline void add_tiles(const LosslessPanel& panel, std::size_t row) {
  std::size_t vector = 0;
  for (; vector + L::kPanelVectors <= panel.vectors; vector += L::kPanelVectors) {
    add_tile<L, Rows, L::kPanelVectors>(panel, row, vector);
  }
  for (; vector < panel.vectors; ++vector) add_tile<L, Rows, 1>(panel, row, vector);
}

template <class L>
void add_panel(const LosslessPanel& panel) {
  std::size_t row = 0;
  for (; row + 4 <= panel.rows; row += 4) add_tiles<L, 4>(panel, row);
  for (; row < panel.rows; ++row) add_tiles<L, 1>(panel, row);
}

template <class L>
constexpr LosslessKernels lossless_kernels_of() {
  return {.split = split_words,
          .join = join_words,
          .add_bfloat16 = add_row<L, WordFormat::kBfloat16>,
          .add_half = add_row<L, WordFormat::kHalf>,
          .expand_bfloat16 = expand_row<L, WordFormat::kBfloat16>,
          .expand_half = expand_row<L, WordFormat::kHalf>,
          .add_panel = add_panel<L>};
}

}  // namespace
}  // namespace entrollm
