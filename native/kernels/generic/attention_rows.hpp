// Sums of products for some rows of attention, in registers.
#pragma once

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

// The scores of a row, which become weights.
inline float* scores_of(const AttentionTile& tile, std::size_t row) {
  return tile.scratch + row * kPositionsAtOnce;
}

// The sums of a row so far.
inline float* outputs_of(const AttentionTile& tile, std::size_t row) {
  return scores_of(tile, tile.rows) + row * tile.head_dim;
}

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

// sums[row][i] += factor(row, k) * vector i of load(k, i), for k below `terms`.
template <std::size_t Rows, std::size_t Vectors, class Sums, class Factor, class Load>
[[gnu::always_inline]] inline void multiply_add(Sums (&sums)[Rows][Vectors], std::size_t terms,
                                                Factor factor, Load load) {
  constexpr std::make_index_sequence<Rows> kRows;
  constexpr std::make_index_sequence<Vectors> kVectorsOf;
  for (std::size_t k = 0; k < terms; ++k) {
    decltype(load(k, k)) vectors[Vectors];
    unroll(kVectorsOf,
           [&]<std::size_t I>() __attribute__((always_inline)) { vectors[I] = load(k, I); });
    unroll(kRows, [&]<std::size_t Row>() __attribute__((always_inline)) {
      const auto by = factor(Row, k);
      unroll(kVectorsOf, [&]<std::size_t I>() __attribute__((always_inline)) {
        sums[Row][I] = add_product(sums[Row][I], by, vectors[I]);
      });
    });
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

}  // namespace
}  // namespace entrollm
