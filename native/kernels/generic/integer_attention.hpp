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

// Vector i of two rows. What follows them by `ahead` bytes, in the next block of positions, is
// loaded to the second-level cache; the first level has no room for two blocks.
inline PairLanes load_pairs_and_prefetch(const std::int8_t* one, const std::int8_t* other,
                                         std::size_t i, std::size_t ahead) {
  if (i == 0) {
    __builtin_prefetch(one + ahead, 0, 2);
    __builtin_prefetch(other + ahead, 0, 2);
  }
  return load_pairs(one + i * kLanes, other + i * kLanes);
}

// sums[row][i] += factor(row, k) * vector i of load(row 2 k, row 2 k + 1, i), for `count` rows from
// `first` on, `stride` apart. An odd last row has itself as the other, and a factor of 0.
template <std::size_t Rows, std::size_t Vectors, class Factor, class Load>
[[gnu::always_inline]] inline void add_pairs(IntegerLanes (&sums)[Rows][Vectors], std::size_t count,
                                             Factor factor, const std::int8_t* first,
                                             std::size_t stride, Load load) {
  multiply_add(sums, count / 2, factor, [&](std::size_t k, std::size_t i) {
    const std::int8_t* row = first + 2 * k * stride;
    return load(row, row + stride, i);
  });
  if (count % 2 == 0) return;
  const std::int8_t* last = first + (count - 1) * stride;
  multiply_add(
      sums, 1, [&](std::size_t row, std::size_t) { return factor(row, count / 2); },
      [&](std::size_t, std::size_t i) { return load(last, last, i); });
}

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
    const auto store = [&](std::size_t row, std::size_t place, const IntegerLanes& sums,
                           const Lanes& scale) {
      store_lanes(scores + row * kPositionsAtOnce + place,
                  to_floats(sums) * (scale * splat(query_units_[first + row])));
    };
    const std::size_t whole = for_vectors(count, [&]<std::size_t Vectors>(std::size_t offset) {
      IntegerLanes sums[Rows][Vectors] = {};
      add_pairs(sums, tile_.head_dim, query, keys + offset, run.key_stride,
                [](const std::int8_t* one, const std::int8_t* other, std::size_t i) {
                  return load_pairs_and_prefetch(one, other, i, kPositionsAtOnce);
                });
      for (std::size_t i = 0; i < Vectors; ++i) {
        const std::size_t place = offset + i * kLanes;
        const Lanes scale = load_lanes(scales + place);
        for (std::size_t row = 0; row < Rows; ++row) store(row, place, sums[row][i], scale);
      }
    });
    if (whole == count) return;
    IntegerLanes sums[Rows][1] = {};
    add_pairs(sums, tile_.head_dim, query, keys + whole, run.key_stride,
              [&](const std::int8_t* one, const std::int8_t* other, std::size_t) {
                return load_some_pairs(one, other, count - whole);
              });
    const Lanes scale = load_some(scales + whole, count - whole, 0.0f);
    for (std::size_t row = 0; row < Rows; ++row) store(row, whole, sums[row][0], scale);
  }

  // What a weight is multiplied by where its score grows by `x`.
  static Lanes power(const Lanes& x) { return power_of_two(x); }

  // Turns the scores of a row, at most `top`, into weights times the scales of the values. Returns
  // the sum of the weights.
  float weigh(const PositionRun& run, std::size_t row, std::size_t begin, std::size_t count,
              float top) {
    const float* scales = run.value_scales + begin;
    float* const scores = scores_of(tile_, row);
    Lanes total = splat(0.0f);
    LargestMagnitude largest;
    const auto weigh_at = [&](std::size_t i, const Lanes& scale) {
      const Lanes weights = power(load_lanes(scores + i) - splat(top));
      total = total + weights;
      const Lanes scaled = weights * scale;
      store_lanes(scores + i, scaled);
      largest.add(scaled);
    };
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) weigh_at(i, load_lanes(scales + i));
    if (i < count) weigh_at(i, load_some(scales + i, count - i, 0.0f));
    largest_weights_[row] = largest.value();
    return sum_of(total);
  }

  // Adds the values of `count` positions of a run from `begin` on, each times its weight, to the
  // outputs of rows from `first` on.
  template <std::size_t Rows>
  void mix(const PositionRun& run, std::size_t first, std::size_t begin, std::size_t count) {
    const std::size_t width = tile_.head_dim;
    const std::int8_t* values = static_cast<const std::int8_t*>(run.values) + begin * width;
    const std::int16_t* weights = weights_ + first * kPositionsAtOnce;
    float* const outputs = outputs_of(tile_, first);
    float units[Rows];
    for (std::size_t row = 0; row < Rows; ++row) units[row] = round_weights(first + row, count);
    const auto weight = [&](std::size_t row, std::size_t k) {
      return load_factor(weights + row * kPositionsAtOnce + 2 * k);
    };
    const auto added = [&](std::size_t row, const Lanes& before, const IntegerLanes& sums) {
      return before + to_floats(sums) * splat(units[row]);
    };
    const std::size_t whole = for_vectors(width, [&]<std::size_t Vectors>(std::size_t at) {
      IntegerLanes sums[Rows][Vectors] = {};
      add_pairs(sums, count, weight, values + at, width,
                [&](const std::int8_t* one, const std::int8_t* other, std::size_t i) {
                  return load_pairs_and_prefetch(one, other, i, kPositionsAtOnce * width);
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
    add_pairs(sums, count, weight, values + whole, width,
              [&](const std::int8_t* one, const std::int8_t* other, std::size_t) {
                return load_some_pairs(one, other, width - whole);
              });
    for (std::size_t row = 0; row < Rows; ++row) {
      float* const place = outputs + row * width + whole;
      const Lanes before = load_some(place, width - whole, 0.0f);
      store_some(place, added(row, before, sums[row][0]), width - whole);
    }
  }

 private:
  // Returns what the integers count.
  float round_weights(std::size_t row, std::size_t count) {
    const Rounding rounding(largest_weights_[row], kLargestMagnitude);
    const Lanes inverse = splat(rounding.inverse);
    for (std::size_t i = 0; i < padded(count); i += kLanes) {
      store_rounded(weights_ + row * kPositionsAtOnce + i,
                    load_lanes(scores_of(tile_, row) + i) * inverse);
    }
    return rounding.unit;
  }

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
    return rounding.unit * tile_.scale * 1.44269504f;  // for powers of two instead of e
  }

  const AttentionTile& tile_;
  const std::size_t pairs_;      // of features
  std::int16_t* const weights_;  // rows of kPositionsAtOnce
  std::int16_t* const queries_;  // of each set of rows, (pairs, rows, 2)
  float query_units_[kAttentionRows];
  float largest_weights_[kAttentionRows];
};

}  // namespace
}  // namespace entrollm
