// Those AVX-512 kernels that have a file of their own.
#pragma once

#include "kernels/kernels.hpp"

namespace entrollm {

extern const EncodeKernels kAvx512EncodeKernels;

std::size_t cascade_product(const CascadeRun& run, std::int64_t* sums);

}  // namespace entrollm
