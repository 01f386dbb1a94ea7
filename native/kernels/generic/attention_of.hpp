// Attention over cached keys and values of every type, and what rounds them to it, for the
// instruction set that the including file is compiled for. The softmax runs along: whenever a block
// of positions has a larger score than those before, what these have given is scaled down.
#pragma once

#include <bit>
#include <cmath>

#include "kernels/generic/float_attention.hpp"
#include "kernels/generic/integer_attention.hpp"

namespace entrollm {
namespace {

// The softmax of a row as far as its positions have been seen.
struct Running {
  float largest = -std::numeric_limits<float>::infinity();  // score
  float total = 0.0f;                                       // of weights

  // What scores are compared with: a row that has seen no position yet has no largest one.
  float top() const { return largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest; }
};

// Hides the scores of a block outside [begin, end), and moves the largest so far. Returns how much
// it moved, -infinity if there was none.
inline float raise_largest(float* scores, std::size_t begin, std::size_t end, std::size_t count,
                           Running& row) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  const std::size_t room = padded(count);
  for (std::size_t i = 0; i < begin; ++i) scores[i] = kHidden;
  for (std::size_t i = end; i < room; ++i) scores[i] = kHidden;
  Lanes largest = splat(row.largest);
  for (std::size_t i = 0; i < room; i += kLanes) {
    largest = larger(largest, load_lanes(scores + i));
  }
  const float before = row.largest;
  row.largest = fold(largest, [](float a, float b) { return a > b ? a : b; });
  return before - row.top();
}

// `place` as one of the `count` positions from `begin` on, or their end.
inline std::size_t within(std::size_t place, std::size_t begin, std::size_t count) {
  if (place <= begin) return 0;
  return place - begin < count ? place - begin : count;
}

// The first and the end of the positions that the rows of a tile see.
struct Seen {
  std::size_t begin, end;

  explicit Seen(const AttentionTile& tile) : begin(tile.firsts[0]), end(tile.lasts[0]) {
    for (std::size_t row = 1; row < tile.rows; ++row) {
      begin = tile.firsts[row] < begin ? tile.firsts[row] : begin;
      end = tile.lasts[row] > end ? tile.lasts[row] : end;
    }
  }
};

// `Arithmetic` has the functions of FloatAttention.
template <class Arithmetic>
void attend_tile(const AttentionTile& tile) {
  const Seen seen(tile);
  const std::size_t width = tile.head_dim;
  Arithmetic arithmetic(tile);
  for (std::size_t i = 0; i < tile.rows * width; ++i) outputs_of(tile, 0)[i] = 0.0f;
  Running running[kAttentionRows];
  std::size_t start = 0;  // of a run
  for (std::size_t at = 0; at < tile.run_count; ++at) {
    const PositionRun& run = tile.runs[at];
    const std::size_t last = within(seen.end, start, run.count);
    for (std::size_t begin = within(seen.begin, start, run.count); begin < last;
         begin += kPositionsAtOnce) {
      const std::size_t count = last - begin < kPositionsAtOnce ? last - begin : kPositionsAtOnce;
      for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
        arithmetic.template score<Rows>(run, first, begin, count);
      });
      float moved[kAttentionRows];
      for (std::size_t row = 0; row < tile.rows; ++row) {
        const std::size_t from = within(tile.firsts[row], start + begin, count);
        const std::size_t to = within(tile.lasts[row], start + begin, count);
        moved[row] = raise_largest(scores_of(tile, row), from, to, count, running[row]);
      }
      for (std::size_t row = 0; row < tile.rows; ++row) {
        const float total = arithmetic.weigh(run, row, begin, count, running[row].top());
        const float factor =
            moved[row] == 0.0f ? 1.0f : first_of(Arithmetic::power(splat(moved[row])));
        running[row].total = running[row].total * factor + total;
        if (factor == 1.0f) continue;
        for (std::size_t i = 0; i < width; ++i) outputs_of(tile, row)[i] *= factor;
      }
      for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
        arithmetic.template mix<Rows>(run, first, begin, count);
      });
    }
    start += run.count;
  }
  for (std::size_t row = 0; row < tile.rows; ++row) {
    for (std::size_t i = 0; i < width; ++i) {
      tile.outputs[row][i] = outputs_of(tile, row)[i] / running[row].total;
    }
  }
}

void attend(const AttentionTile& tile) {
  switch (tile.type) {
    case CacheType::kFloat32:
      return attend_tile<FloatAttention<float>>(tile);
    case CacheType::kFloat16:
      return attend_tile<FloatAttention<std::uint16_t>>(tile);
    case CacheType::kInt8:
      return attend_tile<IntegerAttention>(tile);
  }
}

void round_to_half(const float* x, std::size_t count, std::uint16_t* out) {
  constexpr float kLargest = 65504.0f, kLeastNormal = 0x1p-14f;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x[i]);
    float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
    magnitude = magnitude < kLargest ? magnitude : kLargest;
    std::uint32_t half = std::bit_cast<std::uint32_t>(magnitude);
    // Moves the exponent by 112, and rounds to the 13 bits above those that go.
    half = (half - (112u << 23) + 0xfffu + ((half >> 13) & 1u)) >> 13;
    // The last bit of a number near one half stands for 2^-24, as that of a small half does.
    const std::uint32_t small = std::bit_cast<std::uint32_t>(magnitude + 0.5f) - (126u << 23);
    half = magnitude < kLeastNormal ? small : half;
    out[i] = static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
  }
}

float round_to_int8(const float* x, std::size_t count, std::int8_t* out) {
  // Adding and subtracting this rounds a float below 2^22 to an integer, ties to even.
  constexpr float kRounder = 12582912.0f;
  float largest = 0.0f;
  for (std::size_t i = 0; i < count; ++i) {
    const float magnitude = x[i] < 0.0f ? -x[i] : x[i];
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = largest / 127.0f;
  const float inverse = largest > 1e-30f && largest < 1e30f ? 127.0f / largest : 0.0f;
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = static_cast<std::int8_t>((x[i] * inverse + kRounder) - kRounder);
  }
  return inverse == 0.0f ? 0.0f : scale;
}

void spread(float* x, std::size_t count) {
  const std::size_t size = count & (~count + 1);  // the largest power of two that divides it
  const float factor = 1.0f / std::sqrt(static_cast<float>(size));
  for (std::size_t half = 1; half < size; half *= 2) {
    for (std::size_t first = 0; first < count; first += 2 * half) {
      for (std::size_t i = first; i < first + half; ++i) {
        const float sum = x[i] + x[i + half];
        const float difference = x[i] - x[i + half];
        x[i] = sum;
        x[i + half] = difference;
      }
    }
  }
  for (std::size_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace
}  // namespace entrollm
