// The dot products, written once over the multiplications of an instruction set.
//
// D is a class such as Avx2Products. It has
//
//   kPartBytes       the number of weights that are loaded at once
//   load(weights)    kPartBytes weights, ready to be multiplied
//   Sums<Columns>    the exact sum of the products with one of Columns activation vectors, which
//                    are multiplied together. It starts at zero and has
//     kStep                       the number of weights in a turn of the loop
//     add<Part>(weights, x, at)   adds the products of loaded weights with x from column `at` on;
//                                 Part is the number of this load in the turn
//     total(x, count)             the sum over `count` weights
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {  // every instruction set compiles its own

template <class D, std::size_t Columns>
[[gnu::always_inline]] inline void dot_columns(const std::uint8_t* weights, const Digits* x,
                                               std::size_t count, std::int64_t* out) {
  using Sums = typename D::template Sums<Columns>;
  Sums sums[Columns];
  const auto add_part = [&]<std::size_t Part>(std::size_t at) __attribute__((always_inline)) {
    const auto part = D::load(weights + at);
    for (std::size_t column = 0; column < Columns; ++column) {
      sums[column].template add<Part>(part, x[column], at);
    }
  };
  constexpr auto kParts = std::make_index_sequence<Sums::kStep / D::kPartBytes>();
  for (std::size_t i = 0; i < count; i += Sums::kStep) {
    [&]<std::size_t... Part>(std::index_sequence<Part...>) __attribute__((always_inline)) {
      (add_part.template operator()<Part>(i + Part * D::kPartBytes), ...);
    }(kParts);
  }
  for (std::size_t column = 0; column < Columns; ++column) {
    out[column] = sums[column].total(x[column], count);
  }
}

template <class D>
std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  std::int64_t sum;
  dot_columns<D, 1>(weights, &x, count, &sum);
  return sum;
}

template <class D>
void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  dot_columns<D, kColumnTile>(weights, x, count, out);
}

}  // namespace
}  // namespace entrollm
