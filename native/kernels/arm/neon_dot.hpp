// The dot products of ARMv8.2; see Kernels.
#pragma once

#include "kernels/kernels.hpp"

namespace entrollm {

std::int64_t neon_sdot(const std::uint8_t* weights, const Digits& x, std::size_t count);
void neon_sdot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count,
                    std::int64_t* out);

}  // namespace entrollm
