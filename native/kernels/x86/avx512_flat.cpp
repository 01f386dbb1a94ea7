#include "kernels/generic/flat_pack.hpp"
#include "kernels/x86/flat_avx512.hpp"

namespace entrollm {

const FlatKernels kAvx512FlatKernels = {.pack = pack_flat, .unpack = unpack_flat<FlatLanes>};

}  // namespace entrollm
