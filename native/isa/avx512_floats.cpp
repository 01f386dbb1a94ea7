#include "isa/float_kernels_of.hpp"

namespace entrollm {

const FloatKernels kAvx512FloatKernels = {rms_norm, rotate, swiglu, attend};

}  // namespace entrollm
