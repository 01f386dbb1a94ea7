// The loop over a dense list's vectors that kernels of 128- and 256-bit lanes share.
#pragma once

#include <cstddef>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {  // every instruction set compiles its own

// Calls `body.step<Step>()` for each of `count` symbols' vectors.
template <class Body>
[[gnu::always_inline]] inline void for_each_vector(std::size_t count, Body& body) {
  std::size_t left = count / kVector;
  for (; left >= 4; left -= 4) {
    body.template step<0>();
    body.template step<1>();
    body.template step<2>();
    body.template step<3>();
  }
  if (left > 0) body.template step<0>();
  if (left > 1) body.template step<1>();
  if (left > 2) body.template step<2>();
}

}  // namespace
}  // namespace entrollm
