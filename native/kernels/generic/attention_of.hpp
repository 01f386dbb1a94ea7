// Attention over cached keys and values of every type, and what rounds them to it, for the
// instruction set that the including file is compiled for. Scores are summed feature by feature and
// values position by position, whatever the blocks are.
#pragma once

#include <bit>
#include <cmath>

#include "kernels/float_kernels.hpp"
#include "kernels/generic/float_lanes.hpp"
#include "kernels/generic/instantiations.hpp"

namespace entrollm {
namespace {

// Rows whose sums are in registers at once, and the vectors of each: there are 32 registers, or 16.
#if defined(__AVX__) && !defined(__AVX512F__)
inline constexpr std::size_t kRowsAtOnce = 4, kVectors = 1;
#else
inline constexpr std::size_t kRowsAtOnce = kLanes == kNative ? 8 : 4;
inline constexpr std::size_t kVectors = kLanes == kNative ? 3 : 1;
#endif
// Positions whose keys or values stay in a cache while all rows of a tile use them.
inline constexpr std::size_t kPositionsAtOnce = 256;

// Calls block<kVectors>(at) and then block<1>(at) for the whole vectors of `count` elements;
// returns how many elements these have.
template <class Block>
std::size_t for_vectors(std::size_t count, Block block) {
  std::size_t at = 0;
  for (; at + kVectors * kLanes <= count; at += kVectors * kLanes) {
    block.template operator()<kVectors>(at);
  }
  for (; at + kLanes <= count; at += kLanes) block.template operator()<1>(at);
  return at;
}

// sums[row][i] += weights(row, k) * vector i of load(k, i), for k below `terms`.
template <std::size_t Rows, std::size_t Vectors, class Weight, class Load>
inline void multiply_add(Lanes (&sums)[Rows][Vectors], std::size_t terms, Weight weight,
                         Load load) {
  for (std::size_t k = 0; k < terms; ++k) {
    Lanes vectors[Vectors];
    for (std::size_t i = 0; i < Vectors; ++i) vectors[i] = load(k, i);
    for (std::size_t row = 0; row < Rows; ++row) {
      const Lanes factor = splat(weight(row, k));
      for (std::size_t i = 0; i < Vectors; ++i) {
        sums[row][i] = sums[row][i] + factor * vectors[i];
      }
    }
  }
}

// What a tile sees: positions [base, base + count), of which a row of scratch has `room`.
struct Span {
  std::size_t base;
  std::size_t count;
  std::size_t room;
};

// Some rows of a tile.
struct RowSet {
  const float* queries;  // (head_dim, rows)
  float* scores;         // rows of Span::room floats
  float* outputs;        // rows of head_dim floats, sums so far
};

// Writes the scores of positions [begin, end) of a span.
template <std::size_t Rows, class T>
void score(const AttentionTile& tile, const Span& span, const RowSet& rows, std::size_t begin,
           std::size_t end) {
  const Lanes scale = splat(tile.scale);
  const T* keys = static_cast<const T*>(tile.keys) + span.base;
  const float* scales = tile.key_scales == nullptr ? nullptr : tile.key_scales + span.base;
  const auto query = [&](std::size_t row, std::size_t k) { return rows.queries[k * Rows + row]; };
  const std::size_t whole = for_vectors(end - begin, [&]<std::size_t Vectors>(std::size_t offset) {
    const T* at = keys + begin + offset;
    Lanes sums[Rows][Vectors] = {};
    multiply_add(sums, tile.head_dim, query, [&](std::size_t k, std::size_t i) {
      const T* vector = at + k * tile.key_stride + i * kLanes;
      __builtin_prefetch(vector + kPositionsAtOnce);
      return load_lanes(vector);
    });
    for (std::size_t i = 0; i < Vectors; ++i) {
      const std::size_t place = begin + offset + i * kLanes;
      const Lanes factor = scales == nullptr ? scale : scale * load_lanes(scales + place);
      for (std::size_t row = 0; row < Rows; ++row) {
        store_lanes(rows.scores + row * span.room + place, sums[row][i] * factor);
      }
    }
  });
  const std::size_t place = begin + whole;
  if (place == end) return;
  Lanes sums[Rows][1] = {};
  multiply_add(sums, tile.head_dim, query, [&](std::size_t k, std::size_t) {
    return load_some(keys + k * tile.key_stride + place, end - place, T{});
  });
  const Lanes factor =
      scales == nullptr ? scale : scale * load_some(scales + place, end - place, 0.0f);
  for (std::size_t row = 0; row < Rows; ++row) {
    store_lanes(rows.scores + row * span.room + place, sums[row][0] * factor);
  }
}

// Adds the values of positions [begin, end) of a span, each times its weight, to the outputs.
template <std::size_t Rows, class T>
void mix(const AttentionTile& tile, const Span& span, const RowSet& rows, std::size_t begin,
         std::size_t end) {
  const std::size_t width = tile.head_dim;
  const T* values = static_cast<const T*>(tile.values) + (span.base + begin) * width;
  const auto weight = [&](std::size_t row, std::size_t k) {
    return rows.scores[row * span.room + begin + k];
  };
  const std::size_t whole = for_vectors(width, [&]<std::size_t Vectors>(std::size_t at) {
    Lanes sums[Rows][Vectors];
    for (std::size_t row = 0; row < Rows; ++row) {
      for (std::size_t i = 0; i < Vectors; ++i) {
        sums[row][i] = load_lanes(rows.outputs + row * width + at + i * kLanes);
      }
    }
    multiply_add(sums, end - begin, weight, [&](std::size_t k, std::size_t i) {
      return load_lanes(values + k * width + at + i * kLanes);
    });
    for (std::size_t row = 0; row < Rows; ++row) {
      for (std::size_t i = 0; i < Vectors; ++i) {
        store_lanes(rows.outputs + row * width + at + i * kLanes, sums[row][i]);
      }
    }
  });
  if (whole == width) return;
  Lanes sums[Rows][1];
  for (std::size_t row = 0; row < Rows; ++row) {
    sums[row][0] = load_some(rows.outputs + row * width + whole, width - whole, 0.0f);
  }
  multiply_add(sums, end - begin, weight, [&](std::size_t k, std::size_t) {
    return load_some(values + k * width + whole, width - whole, T{});
  });
  for (std::size_t row = 0; row < Rows; ++row) {
    store_some(rows.outputs + row * width + whole, sums[row][0], width - whole);
  }
}

// Replaces scores by exp(score - largest), those outside [begin, end) by 0; returns their sum.
inline float soften(float* scores, std::size_t begin, std::size_t end, std::size_t room) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < begin; ++i) scores[i] = kHidden;
  for (std::size_t i = end; i < room; ++i) scores[i] = kHidden;
  Lanes largest = load_lanes(scores);
  for (std::size_t i = kLanes; i < room; i += kLanes) {
    largest = larger(largest, load_lanes(scores + i));
  }
  const Lanes top = splat(fold(largest, [](float a, float b) { return a > b ? a : b; }));
  Lanes total = splat(0.0f);
  for (std::size_t i = 0; i < room; i += kLanes) {
    const Lanes weights = exp_of(load_lanes(scores + i) - top);
    store_lanes(scores + i, weights);
    total = total + weights;
  }
  return sum_of(total);
}

// Calls body(begin, end) for the blocks of `count` positions.
template <class Body>
void for_positions(std::size_t count, Body body) {
  for (std::size_t begin = 0; begin < count; begin += kPositionsAtOnce) {
    body(begin, count - begin < kPositionsAtOnce ? count : begin + kPositionsAtOnce);
  }
}

// Calls body<Rows>(first) for sets of at most kRowsAtOnce rows.
template <class Body>
void for_row_sets(std::size_t rows, Body body) {
  for (std::size_t first = 0; first < rows; first += kRowsAtOnce) {
    const std::size_t set = rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce;
    instantiation<1, kRowsAtOnce>(static_cast<int>(set), []<int Rows>() {
      return +[](const Body& call, std::size_t at) { call.template operator()<Rows>(at); };
    })(body, first);
  }
}

template <class T>
void attend_tile(const AttentionTile& tile) {
  std::size_t base = tile.firsts[0];
  std::size_t end = tile.lasts[0];
  for (std::size_t row = 1; row < tile.rows; ++row) {
    base = tile.firsts[row] < base ? tile.firsts[row] : base;
    end = tile.lasts[row] > end ? tile.lasts[row] : end;
  }
  const std::size_t width = tile.head_dim;
  const Span span{base, end - base, (end - base + kLanes - 1) / kLanes * kLanes};
  float* const sums = tile.scratch + tile.rows * span.room;
  float* const queries = sums + tile.rows * width;
  const auto set_of = [&](std::size_t first) {
    return RowSet{queries + first * width, tile.scratch + first * span.room, sums + first * width};
  };
  for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
    for (std::size_t k = 0; k < width; ++k) {
      for (std::size_t row = 0; row < Rows; ++row) {
        queries[first * width + k * Rows + row] = tile.queries[first + row][k];
      }
    }
  });
  for_positions(span.count, [&](std::size_t begin, std::size_t until) {
    for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
      score<Rows, T>(tile, span, set_of(first), begin, until);
    });
  });
  float totals[kAttentionRows];
  for (std::size_t row = 0; row < tile.rows; ++row) {
    float* const scores = tile.scratch + row * span.room;
    totals[row] = soften(scores, tile.firsts[row] - base, tile.lasts[row] - base, span.room);
    if (tile.value_scales != nullptr) {
      for (std::size_t i = 0; i < span.count; ++i) scores[i] *= tile.value_scales[base + i];
    }
  }
  for (std::size_t i = 0; i < tile.rows * width; ++i) sums[i] = 0.0f;
  for_positions(span.count, [&](std::size_t begin, std::size_t until) {
    for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
      mix<Rows, T>(tile, span, set_of(first), begin, until);
    });
  });
  for (std::size_t row = 0; row < tile.rows; ++row) {
    for (std::size_t i = 0; i < width; ++i) {
      tile.outputs[row][i] = sums[row * width + i] / totals[row];
    }
  }
}

void attend(const AttentionTile& tile) {
  switch (tile.type) {
    case CacheType::kFloat32:
      return attend_tile<float>(tile);
    case CacheType::kFloat16:
      return attend_tile<std::uint16_t>(tile);
    case CacheType::kInt8:
      return attend_tile<std::int8_t>(tile);
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
