// Scores and mixed values from integers with a scale for each position. Queries are rounded to 16
// bits, and so are the weights of a block of positions; all sums of products are exact.
#pragma once

#include "kernels/generic/attention_rows.hpp"
#include "kernels/generic/integer_lanes.hpp"

namespace entrollm {
namespace {

inline constexpr std::int32_t kLargestMagnitude = 32767;

// The largest magnitude among floats; infinity or NaN if one is not finite.
class LargestMagnitude {
 public:
  void add(const Lanes& lanes) {
    for (std::size_t i = 0; i < Lanes::kParts; ++i) {
      const NativeIntegers bits = (NativeIntegers)lanes.part[i] & 0x7fffffff;
      largest_.part[i] = bits > largest_.part[i] ? bits : largest_.part[i];
    }
  }

  float value() const {
    std::int32_t most = 0;
    for (const NativeIntegers& part : largest_.part) {
      for (std::size_t i = 0; i < kNative; ++i) most = part[i] > most ? part[i] : most;
    }
    return std::bit_cast<float>(most);
  }

 private:
  IntegerLanes largest_ = {};  // bits, which compare as integers
};

// What numbers are multiplied by before they are rounded, and what the integers count. Numbers that
// are too small count nothing, and those that are not finite make everything NaN.
struct Rounding {
  float inverse, unit;

  Rounding(float largest, float range) {
    const bool is_small = largest < 1e-30f;
    inverse = is_small ? 0.0f : range / largest;
    unit = is_small ? 0.0f : largest / range;
    if (!(largest <= std::numeric_limits<float>::max())) {
      unit = std::numeric_limits<float>::quiet_NaN();
    }
  }
};

class IntegerAttention {
 public:
  explicit IntegerAttention(const AttentionTile& tile)
      : tile_(tile),
        pairs_((tile.head_dim + 1) / 2),
        weights_(tile.integers),
        queries_(tile.integers + tile.rows * kPositionsAtOnce) {
    // Sums of products with 8-bit keys stay below 2^31.
    const auto most = static_cast<std::int32_t>(0x7fffffff / (128 * tile.head_dim));
    const float range = static_cast<float>(most < kLargestMagnitude ? most : kLargestMagnitude);
    for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
      for (std::size_t row = 0; row < Rows; ++row) {
        query_units_[first + row] = round_query(tile.queries[first + row], range,
                                                queries_ + 2 * (first * pairs_ + row), 2 * Rows);
      }
    });
  }

  // Writes the scores of `count` positions of a run from `begin` on, at most kPositionsAtOnce, for
  // rows from `first` on.
  template <std::size_t Rows>
  void score(const PositionRun& run, std::size_t first, std::size_t begin, std::size_t count) {
    const std::int8_t* keys = static_cast<const std::int8_t*>(run.keys) + begin;
    const float* scales = run.key_scales + begin;
    float* const scores = scores_of(tile_, first);
    const std::int16_t* queries = queries_ + 2 * first * pairs_;
    const auto query = [&](std::size_t row, std::size_t k) {
      return load_factor(queries + 2 * (k * Rows + row));
    };
    // From a feature to the one it is multiplied with; an odd last one has no other.
    const auto step = [&](std::size_t k) {
      return 2 * k + 1 < tile_.head_dim ? run.key_stride : 0;
    };
    const auto store = [&](std::size_t row, std::size_t place, const IntegerLanes& sums,
                           const Lanes& scale) {
      store_lanes(scores + row * kPositionsAtOnce + place,
                  to_floats(sums) * (scale * splat(query_units_[first + row])));
    };
    const std::size_t whole = for_vectors(count, [&]<std::size_t Vectors>(std::size_t offset) {
      IntegerLanes sums[Rows][Vectors] = {};
      multiply_add(sums, pairs_, query, [&](std::size_t k, std::size_t i) {
        const std::int8_t* vector = keys + offset + 2 * k * run.key_stride + i * kLanes;
        const std::int8_t* other = vector + step(k);
        if (i == 0) {
          __builtin_prefetch(vector + kPositionsAtOnce);
          __builtin_prefetch(other + kPositionsAtOnce);
        }
        return load_pairs(vector, other);
      });
      for (std::size_t i = 0; i < Vectors; ++i) {
        const std::size_t place = offset + i * kLanes;
        const Lanes scale = load_lanes(scales + place);
        for (std::size_t row = 0; row < Rows; ++row) store(row, place, sums[row][i], scale);
      }
    });
    if (whole == count) return;
    IntegerLanes sums[Rows][1] = {};
    multiply_add(sums, pairs_, query, [&](std::size_t k, std::size_t) {
      const std::int8_t* vector = keys + whole + 2 * k * run.key_stride;
      return load_some_pairs(vector, vector + step(k), count - whole);
    });
    const Lanes scale = load_some(scales + whole, count - whole, 0.0f);
    for (std::size_t row = 0; row < Rows; ++row) store(row, whole, sums[row][0], scale);
  }

  // Multiplies the weights of a row by the scales of the values, and rounds them.
  void weigh(const PositionRun& run, std::size_t row, std::size_t begin, std::size_t count) {
    const float* scales = run.value_scales + begin;
    float* const weights = scores_of(tile_, row);
    const std::size_t room = (count + kLanes - 1) / kLanes * kLanes;
    LargestMagnitude largest;
    for (std::size_t i = 0; i < room; i += kLanes) {
      const Lanes scale =
          i + kLanes <= count ? load_lanes(scales + i) : load_some(scales + i, count - i, 0.0f);
      const Lanes weight = load_lanes(weights + i) * scale;
      store_lanes(weights + i, weight);
      largest.add(weight);
    }
    const Rounding rounding(largest.value(), kLargestMagnitude);
    const Lanes inverse = splat(rounding.inverse);
    for (std::size_t i = 0; i < room; i += kLanes) {
      store_rounded(weights_ + row * kPositionsAtOnce + i, load_lanes(weights + i) * inverse);
    }
    weight_units_[row] = rounding.unit;
  }

  // Adds the values of `count` positions of a run from `begin` on, each times its weight, to the
  // outputs of rows from `first` on.
  template <std::size_t Rows>
  void mix(const PositionRun& run, std::size_t first, std::size_t begin, std::size_t count) {
    const std::size_t width = tile_.head_dim;
    const std::int8_t* values = static_cast<const std::int8_t*>(run.values) + begin * width;
    const std::int16_t* weights = weights_ + first * kPositionsAtOnce;
    float* const outputs = outputs_of(tile_, first);
    const auto weight = [&](std::size_t row, std::size_t k) {
      return load_factor(weights + row * kPositionsAtOnce + 2 * k);
    };
    // An odd last position has no other, and its pair has a weight of 0.
    const auto step = [&](std::size_t k) { return 2 * k + 1 < count ? width : 0; };
    const auto added = [&](std::size_t row, const Lanes& before, const IntegerLanes& sums) {
      return before + to_floats(sums) * splat(weight_units_[first + row]);
    };
    const std::size_t pairs = (count + 1) / 2;
    const std::size_t whole = for_vectors(width, [&]<std::size_t Vectors>(std::size_t at) {
      IntegerLanes sums[Rows][Vectors] = {};
      multiply_add(sums, pairs, weight, [&](std::size_t k, std::size_t i) {
        const std::int8_t* vector = values + 2 * k * width + at + i * kLanes;
        return load_pairs(vector, vector + step(k));
      });
      for (std::size_t row = 0; row < Rows; ++row) {
        for (std::size_t i = 0; i < Vectors; ++i) {
          float* const place = outputs + row * width + at + i * kLanes;
          store_lanes(place, added(row, load_lanes(place), sums[row][i]));
        }
      }
    });
    if (whole == width) return;
    IntegerLanes sums[Rows][1] = {};
    multiply_add(sums, pairs, weight, [&](std::size_t k, std::size_t) {
      const std::int8_t* vector = values + 2 * k * width + whole;
      return load_some_pairs(vector, vector + step(k), width - whole);
    });
    for (std::size_t row = 0; row < Rows; ++row) {
      float* const place = outputs + row * width + whole;
      const Lanes before = load_some(place, width - whole, 0.0f);
      store_some(place, added(row, before, sums[row][0]), width - whole);
    }
  }

 private:
  // Writes pairs of features `step` integers apart. Returns what a sum is multiplied by for a
  // score.
  float round_query(const float* x, float range, std::int16_t* out, std::size_t step) const {
    LargestMagnitude largest;
    for (std::size_t k = 0; k < tile_.head_dim; k += kLanes) {
      const std::size_t left = tile_.head_dim - k;
      largest.add(load_some(x + k, left < kLanes ? left : kLanes, 0.0f));
    }
    const Rounding rounding(largest.value(), range);
    for (std::size_t k = 0; k < tile_.head_dim; ++k) {
      out[k / 2 * step + k % 2] = rounded(x[k] * rounding.inverse);
    }
    if (tile_.head_dim % 2 == 1) out[(pairs_ - 1) * step + 1] = 0;
    return rounding.unit * tile_.scale;
  }

  const AttentionTile& tile_;
  const std::size_t pairs_;      // of features
  std::int16_t* const weights_;  // rows of kPositionsAtOnce
  std::int16_t* const queries_;  // of each set of rows, (pairs, rows, 2)
  float query_units_[kAttentionRows];
  float weight_units_[kAttentionRows];
};

}  // namespace
}  // namespace entrollm
