// The products of 8-bit matrices of ARMv8.6; see Kernels.
#pragma once

#include "kernels/kernels.hpp"

namespace entrollm {

inline constexpr std::size_t kI8mmRows = 8;

void neon_i8mm_dot_tile_rows(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                             std::size_t count, std::int64_t* out);

}  // namespace entrollm
