#include "isa/float_kernels_of.hpp"

namespace entrollm {

const FloatKernels kPortableFloatKernels = {rms_norm, rotate, swiglu, attend};

}  // namespace entrollm
