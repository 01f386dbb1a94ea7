// The fused AVX-512 product of cascade codes.
#pragma once

#include "isa/kernels.hpp"

namespace entrollm {

std::size_t cascade_product(const CascadeRun& run, std::int64_t* sums);

}  // namespace entrollm
