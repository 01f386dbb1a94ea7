#include "isa/float_kernels_of.hpp"

namespace entrollm {

const FloatKernels kAvx2FloatKernels = {rms_norm, rotate, swiglu, attend};

}  // namespace entrollm
