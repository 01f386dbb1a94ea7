// The kernels of lossless matrices, written once over the vectors of an instruction set. L has
//
//   kFloats                      floats of a register: 4, 8 or 16
//   kMostVectors                 activation vectors that share the decoding of a weight
//   kPanelVectors                activation vectors whose products with four rows fit the registers
//   Floats, load(p), store(p, v)
//   add(a, b)                    a + b
//   add_product(sum, a, b)       sum + a * b, rounded once
//   weights<Format>(high, low, out)   the weights of 4 * kFloats columns, one register for each run
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

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

// Adds columns of steps [First, First + Steps) of every chunk, a step being those of four
// registers.
template <class L, WordFormat Format, std::size_t Vectors, std::size_t First, std::size_t Steps>
[[gnu::always_inline]] inline void add_steps(const LosslessRow& row, const float* x, float* lanes) {
  // The low bytes come from memory and the high ones from a cache.
  constexpr std::size_t kAheadBytes = 8192;
  typename L::Floats sums[Steps][Vectors][4];
  const auto at = [](std::size_t step, std::size_t run) {
    return run * kLosslessRun + (First + step) * L::kFloats;
  };
  for (std::size_t step = 0; step < Steps; ++step) {
    for (std::size_t v = 0; v < Vectors; ++v) {
      for (std::size_t run = 0; run < 4; ++run) {
        sums[step][v][run] = L::load(lanes + v * kLosslessLanes + at(step, run));
      }
    }
  }
  const std::uint8_t* high = row.high + First * 4 * L::kFloats;
  const std::uint8_t* low = row.low + First * 4 * L::kFloats;
  for (std::size_t chunk = 0; chunk < row.chunks; ++chunk) {
    if constexpr (First == 0) __builtin_prefetch(low + kAheadBytes, 0, 2);
    for (std::size_t step = 0; step < Steps; ++step) {
      typename L::Floats weights[4];
      L::template weights<Format>(high + step * 4 * L::kFloats, low + step * 4 * L::kFloats,
                                  weights);
      for (std::size_t run = 0; run < 4; ++run) {
        for (std::size_t v = 0; v < Vectors; ++v) {
          sums[step][v][run] = L::add_product(sums[step][v][run], weights[run],
                                              L::load(x + v * row.x_stride + at(step, run)));
        }
      }
    }
    high += kVector;
    low += kVector;
    x += kVector;
  }
  for (std::size_t step = 0; step < Steps; ++step) {
    for (std::size_t v = 0; v < Vectors; ++v) {
      for (std::size_t run = 0; run < 4; ++run) {
        L::store(lanes + v * kLosslessLanes + at(step, run), sums[step][v][run]);
      }
    }
  }
}

// All sums of one vector fit the registers. More vectors take a step at a time: the bytes of a row
// stay in the first-level cache.
template <class L, WordFormat Format, std::size_t Vectors>
[[gnu::always_inline]] inline void add_vectors(const LosslessRow& row, std::size_t first) {
  constexpr std::size_t kSteps = kLosslessRun / L::kFloats;
  const float* x = row.x + first * row.x_stride;
  float* lanes = row.lanes + first * kLosslessLanes;
  if constexpr (Vectors == 1) {
    add_steps<L, Format, Vectors, 0, kSteps>(row, x, lanes);
  } else {
    [&]<std::size_t... Step>(std::index_sequence<Step...>) __attribute__((always_inline)) {
      (add_steps<L, Format, Vectors, Step, 1>(row, x, lanes), ...);
    }(std::make_index_sequence<kSteps>());
  }
}

template <class L, WordFormat Format>
void add_row(const LosslessRow& row) {
  std::size_t first = 0;
  if constexpr (L::kMostVectors >= 4) {
    for (; first + 4 <= row.vectors; first += 4) add_vectors<L, Format, 4>(row, first);
  }
  for (; first + 2 <= row.vectors; first += 2) add_vectors<L, Format, 2>(row, first);
  if (first < row.vectors) add_vectors<L, Format, 1>(row, first);
}

template <class L>
void sum_lanes(const float* lanes, std::size_t count, float* sums) {
  constexpr std::size_t kRegisters = kLosslessLanes / L::kFloats;
  for (std::size_t i = 0; i < count; ++i, lanes += kLosslessLanes) {
    typename L::Floats parts[kRegisters];
    for (std::size_t k = 0; k < kRegisters; ++k) parts[k] = L::load(lanes + k * L::kFloats);
    for (std::size_t half = kRegisters / 2; half > 0; half /= 2) {
      for (std::size_t k = 0; k < half; ++k) parts[k] = L::add(parts[k], parts[k + half]);
    }
    float rest[L::kFloats];
    L::store(rest, parts[0]);
    for (std::size_t half = L::kFloats / 2; half > 0; half /= 2) {
      for (std::size_t k = 0; k < half; ++k) rest[k] = rest[k] + rest[k + half];
    }
    sums[i] = rest[0];
  }
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
    for (std::size_t at = lane; at < panel.chunks * kVector; at += kVector) {
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
          .add_panel = add_panel<L>,
          .sum_lanes = sum_lanes<L>};
}

}  // namespace
}  // namespace entrollm
