// The kernels of an instruction set whose vectors are V and whose products are D.
#pragma once

#include "kernels/generic/dense_kernels_of.hpp"
#include "kernels/generic/dot_kernels_of.hpp"
#include "kernels/generic/sparse_kernels_of.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {  // every instruction set compiles its own

template <class V, class D>
constexpr Kernels kernels_of(const char* name) {
  return {.name = name,
          .sparse_field = sparse_field<V>,
          .dense_field = dense_field<V>,
          .split = split<V>,
          .or_low_bits = or_low_bits<V>,
          .count_all_ones = count_all_ones<V>,
          .dot = dot<D>,
          .dot_tile = dot_tile<D>};
}

}  // namespace
}  // namespace entrollm
