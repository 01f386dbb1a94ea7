#include "kernels/generic/flat_pack.hpp"
#include "kernels/x86/flat_avx2.hpp"

namespace entrollm {

const FlatKernels kAvx2FlatKernels = {.pack = pack_flat, .unpack = unpack_flat<FlatLanes>};

}  // namespace entrollm
