// Scores and mixed values from keys and values that are read as floats.
#pragma once

#include "kernels/generic/attention_rows.hpp"

namespace entrollm {
namespace {

inline Lanes add_product(const Lanes& sums, const Lanes& factor, const Lanes& vectors) {
  return sums + factor * vectors;
}

template <class T>
class FloatAttention {
 public:
  explicit FloatAttention(const AttentionTile& tile)
      : tile_(tile), queries_(tile.scratch + tile.rows * (kPositionsAtOnce + tile.head_dim)) {
    const std::size_t width = tile.head_dim;
    for_row_sets(tile.rows, [&]<std::size_t Rows>(std::size_t first) {
      for (std::size_t k = 0; k < width; ++k) {
        for (std::size_t row = 0; row < Rows; ++row) {
          queries_[first * width + k * Rows + row] = tile.queries[first + row][k];
        }
      }
    });
  }

  // Writes the scores of `count` positions of a run from `begin` on, at most kPositionsAtOnce, for
  // rows from `first` on.
  template <std::size_t Rows>
  void score(const PositionRun& run, std::size_t first, std::size_t begin, std::size_t count) {
    const Lanes scale = splat(tile_.scale);
    const T* keys = static_cast<const T*>(run.keys) + begin;
    float* const scores = scores_of(tile_, first);
    const float* queries = queries_ + first * tile_.head_dim;
    const auto query = [&](std::size_t row, std::size_t k) {
      return splat(queries[k * Rows + row]);
    };
    const std::size_t whole = for_vectors(count, [&]<std::size_t Vectors>(std::size_t offset) {
      const T* at = keys + offset;
      Lanes sums[Rows][Vectors] = {};
      multiply_add(sums, tile_.head_dim, query, [&](std::size_t k, std::size_t i) {
        const T* vector = at + k * run.key_stride + i * kLanes;
        __builtin_prefetch(vector + kPositionsAtOnce);
        return load_lanes(vector);
      });
      for (std::size_t row = 0; row < Rows; ++row) {
        for (std::size_t i = 0; i < Vectors; ++i) {
          store_lanes(scores + row * kPositionsAtOnce + offset + i * kLanes, sums[row][i] * scale);
        }
      }
    });
    if (whole == count) return;
    Lanes sums[Rows][1] = {};
    multiply_add(sums, tile_.head_dim, query, [&](std::size_t k, std::size_t) {
      return load_some(keys + k * run.key_stride + whole, count - whole, T{});
    });
    for (std::size_t row = 0; row < Rows; ++row) {
      store_lanes(scores + row * kPositionsAtOnce + whole, sums[row][0] * scale);
    }
  }

  // What a weight is multiplied by where its score grows by `x`.
  static Lanes power(const Lanes& x) { return exp_of(x); }

  // Turns the scores of a row, at most `top`, into weights. Returns their sum.
  float weigh(const PositionRun&, std::size_t row, std::size_t, std::size_t count, float top) {
    float* const scores = scores_of(tile_, row);
    Lanes total = splat(0.0f);
    for (std::size_t i = 0; i < padded(count); i += kLanes) {
      const Lanes weights = power(load_lanes(scores + i) - splat(top));
      store_lanes(scores + i, weights);
      total = total + weights;
    }
    return sum_of(total);
  }

  // Adds the values of `count` positions of a run from `begin` on, each times its weight, to the
  // outputs of rows from `first` on.
  template <std::size_t Rows>
  void mix(const PositionRun& run, std::size_t first, std::size_t begin, std::size_t count) {
    const std::size_t width = tile_.head_dim;
    const T* values = static_cast<const T*>(run.values) + begin * width;
    const float* scores = scores_of(tile_, first);
    float* const outputs = outputs_of(tile_, first);
    const auto weight = [&](std::size_t row, std::size_t k) {
      return splat(scores[row * kPositionsAtOnce + k]);
    };
    const std::size_t whole = for_vectors(width, [&]<std::size_t Vectors>(std::size_t at) {
      Lanes sums[Rows][Vectors];
      for (std::size_t row = 0; row < Rows; ++row) {
        for (std::size_t i = 0; i < Vectors; ++i) {
          sums[row][i] = load_lanes(outputs + row * width + at + i * kLanes);
        }
      }
      multiply_add(sums, count, weight, [&](std::size_t k, std::size_t i) {
        return load_lanes(values + k * width + at + i * kLanes);
      });
      for (std::size_t row = 0; row < Rows; ++row) {
        for (std::size_t i = 0; i < Vectors; ++i) {
          store_lanes(outputs + row * width + at + i * kLanes, sums[row][i]);
        }
      }
    });
    if (whole == width) return;
    Lanes sums[Rows][1];
    for (std::size_t row = 0; row < Rows; ++row) {
      sums[row][0] = load_some(outputs + row * width + whole, width - whole, 0.0f);
    }
    multiply_add(sums, count, weight, [&](std::size_t k, std::size_t) {
      return load_some(values + k * width + whole, width - whole, T{});
    });
    for (std::size_t row = 0; row < Rows; ++row) {
      store_some(outputs + row * width + whole, sums[row][0], width - whole);
    }
  }

 private:
  const AttentionTile& tile_;
  float* const queries_;  // of each set of rows, (head_dim, rows)
};

}  // namespace
}  // namespace entrollm
