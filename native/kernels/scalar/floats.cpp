#include "kernels/generic/attention_of.hpp"
#include "kernels/generic/float_kernels_of.hpp"
#include "kernels/generic/trellis_of.hpp"

namespace entrollm {

const FloatKernels kPortableFloatKernels = {
    largest_bits, split_digits, scale_sums,    rms_norm,      rotate, swiglu,
    geglu,        attend,       round_to_half, round_to_int8, spread, round_trellis};

}  // namespace entrollm
