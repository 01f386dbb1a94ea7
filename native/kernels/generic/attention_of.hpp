// Attention over cached keys and values of every type, and what rounds them to it, for the
// instruction set that the including file is compiled for. Scores are summed feature by feature and
// values position by position. The softmax runs along: whenever a block of positions has a larger
// score than those before, what these have given is scaled down.
#pragma once

#include <bit>
#include <cmath>
#include <utility>

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

// Calls body<0>() to body<count - 1>(). With indices that are constants from the start, GCC keeps
// arrays in registers; it unrolls loops too late for that.
template <std::size_t... Index, class Body>
[[gnu::always_inline]] inline void unroll(std::index_sequence<Index...>, Body body) {
  (body.template operator()<Index>(), ...);
}

// sums[row][i] += weights(row, k) * vector i of load(k, i), for k below `terms`.
template <std::size_t Rows, std::size_t Vectors, class Weight, class Load>
[[gnu::always_inline]] inline void multiply_add(Lanes (&sums)[Rows][Vectors], std::size_t terms,
                                                Weight weight, Load load) {
  constexpr std::make_index_sequence<Rows> kRows;
  constexpr std::make_index_sequence<Vectors> kVectorsOf;
  for (std::size_t k = 0; k < terms; ++k) {
    Lanes vectors[Vectors];
    unroll(kVectorsOf,
           [&]<std::size_t I>() __attribute__((always_inline)) { vectors[I] = load(k, I); });
    unroll(kRows, [&]<std::size_t Row>() __attribute__((always_inline)) {
      const Lanes factor = splat(weight(Row, k));
      unroll(kVectorsOf, [&]<std::size_t I>() __attribute__((always_inline)) {
        sums[Row][I] = sums[Row][I] + factor * vectors[I];
      });
    });
  }
}

// Some rows of a tile.
struct RowSet {
  const float* queries;  // (head_dim, rows)
  float* scores;         // rows of kPositionsAtOnce floats
  float* outputs;        // rows of head_dim floats, sums so far
};

// Writes the scores of `count` positions of a run from `begin` on, at most kPositionsAtOnce.
template <std::size_t Rows, class T>
void score(const AttentionTile& tile, const PositionRun& run, const RowSet& rows, std::size_t begin,
           std::size_t count) {
  const Lanes scale = splat(tile.scale);
  const T* keys = static_cast<const T*>(run.keys) + begin;
  const float* scales = run.key_scales == nullptr ? nullptr : run.key_scales + begin;
  const auto query = [&](std::size_t row, std::size_t k) { return rows.queries[k * Rows + row]; };
  const std::size_t whole = for_vectors(count, [&]<std::size_t Vectors>(std::size_t offset) {
    const T* at = keys + offset;
    Lanes sums[Rows][Vectors] = {};
    multiply_add(sums, tile.head_dim, query, [&](std::size_t k, std::size_t i) {
      const T* vector = at + k * run.key_stride + i * kLanes;
      __builtin_prefetch(vector + kPositionsAtOnce);
      return load_lanes(vector);
    });
    for (std::size_t i = 0; i < Vectors; ++i) {
      const std::size_t place = offset + i * kLanes;
      const Lanes factor = scales == nullptr ? scale : scale * load_lanes(scales + place);
      for (std::size_t row = 0; row < Rows; ++row) {
        store_lanes(rows.scores + row * kPositionsAtOnce + place, sums[row][i] * factor);
      }
    }
  });
  if (whole == count) return;
  Lanes sums[Rows][1] = {};
  multiply_add(sums, tile.head_dim, query, [&](std::size_t k, std::size_t) {
    return load_some(keys + k * run.key_stride + whole, count - whole, T{});
  });
  const Lanes factor =
      scales == nullptr ? scale : scale * load_some(scales + whole, count - whole, 0.0f);
  for (std::size_t row = 0; row < Rows; ++row) {
    store_lanes(rows.scores + row * kPositionsAtOnce + whole, sums[row][0] * factor);
  }
}

// Adds the values of `count` positions of a run from `begin` on, each times its weight, to the
// outputs.
template <std::size_t Rows, class T>
void mix(const AttentionTile& tile, const PositionRun& run, const RowSet& rows, std::size_t begin,
         std::size_t count) {
  const std::size_t width = tile.head_dim;
  const T* values = static_cast<const T*>(run.values) + begin * width;
  const auto weight = [&](std::size_t row, std::size_t k) {
    return rows.scores[row * kPositionsAtOnce + k];
  };
  const std::size_t whole = for_vectors(width, [&]<std::size_t Vectors>(std::size_t at) {
    Lanes sums[Rows][Vectors];
    for (std::size_t row = 0; row < Rows; ++row) {
      for (std::size_t i = 0; i < Vectors; ++i) {
        sums[row][i] = load_lanes(rows.outputs + row * width + at + i * kLanes);
      }
    }
    multiply_add(sums, count, weight, [&](std::size_t k, std::size_t i) {
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
  multiply_add(sums, count, weight, [&](std::size_t k, std::size_t) {
    return load_some(values + k * width + whole, width - whole, T{});
  });
  for (std::size_t row = 0; row < Rows; ++row) {
    store_some(rows.outputs + row * width + whole, sums[row][0], width - whole);
  }
}

// The softmax of a row as far as its positions have been seen.
struct Running {
  float largest = -std::numeric_limits<float>::infinity();  // score
  float total = 0.0f;                                       // of exp(score - largest)
};

// Replaces the scores of a block by exp(score - largest so far), those outside [begin, end) by 0.
// Returns what weights from earlier blocks are to be multiplied by.
inline float soften(float* scores, std::size_t begin, std::size_t end, std::size_t count,
                    Running& row) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  const std::size_t room = (count + kLanes - 1) / kLanes * kLanes;
  for (std::size_t i = 0; i < begin; ++i) scores[i] = kHidden;
  for (std::size_t i = end; i < room; ++i) scores[i] = kHidden;
  Lanes largest = splat(row.largest);
  for (std::size_t i = 0; i < room; i += kLanes) {
    largest = larger(largest, load_lanes(scores + i));
  }
  const float most = fold(largest, [](float a, float b) { return a > b ? a : b; });
  // A row that has seen no position yet has no largest score.
  const Lanes top = splat(most == kHidden ? 0.0f : most);
  Lanes total = splat(0.0f);
  for (std::size_t i = 0; i < room; i += kLanes) {
    const Lanes weights = exp_of(load_lanes(scores + i) - top);
    store_lanes(scores + i, weights);
    total = total + weights;
  }
  float factor[kLanes];
  store_lanes(factor, exp_of(splat(row.largest) - top));
  row.largest = most;
  row.total = row.total * factor[0] + sum_of(total);
  return factor[0];
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

// `place` as one of the `count` positions from `begin` on, or their end.
inline std::size_t within(std::size_t place, std::size_t begin, std::size_t count) {
  if (place <= begin) return 0;
  return place - begin < count ? place - begin : count;
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
  float* const sums = tile.scratch + tile.rows * kPositionsAtOnce;
  float* const queries = sums + tile.rows * width;
  for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
    for (std::size_t k = 0; k < width; ++k) {
      for (std::size_t row = 0; row < Rows; ++row) {
        queries[first * width + k * Rows + row] = tile.queries[first + row][k];
      }
    }
  });
  for (std::size_t i = 0; i < tile.rows * width; ++i) sums[i] = 0.0f;
  Running running[kAttentionRows];
  const auto set_of = [&](std::size_t first) {
    return RowSet{queries + first * width, tile.scratch + first * kPositionsAtOnce,
                  sums + first * width};
  };
  std::size_t start = 0;  // of a run
  for (std::size_t at = 0; at < tile.run_count; ++at) {
    const PositionRun& run = tile.runs[at];
    const std::size_t last = within(end, start, run.count);
    for (std::size_t begin = within(base, start, run.count); begin < last;
         begin += kPositionsAtOnce) {
      const std::size_t count = last - begin < kPositionsAtOnce ? last - begin : kPositionsAtOnce;
      for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
        score<Rows, T>(tile, run, set_of(first), begin, count);
      });
      for (std::size_t row = 0; row < tile.rows; ++row) {
        float* const scores = tile.scratch + row * kPositionsAtOnce;
        const std::size_t from = within(tile.firsts[row], start + begin, count);
        const std::size_t to = within(tile.lasts[row], start + begin, count);
        const float factor = soften(scores, from, to, count, running[row]);
        if (factor != 1.0f) {
          for (std::size_t i = 0; i < width; ++i) sums[row * width + i] *= factor;
        }
        if (run.value_scales == nullptr) continue;
        for (std::size_t i = 0; i < count; ++i) scores[i] *= run.value_scales[begin + i];
      }
      for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
        mix<Rows, T>(tile, run, set_of(first), begin, count);
      });
    }
    start += run.count;
  }
  for (std::size_t row = 0; row < tile.rows; ++row) {
    for (std::size_t i = 0; i < width; ++i) {
      tile.outputs[row][i] = sums[row * width + i] / running[row].total;
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
