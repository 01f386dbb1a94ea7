// The dot products of AVX-VNNI; see Kernels.
#pragma once

#include "kernels/kernels.hpp"

namespace entrollm {

std::int64_t avx2_vnni_dot(const std::uint8_t* weights, const Digits& x, std::size_t count);
void avx2_vnni_dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count,
                        std::int64_t* out);

}  // namespace entrollm
