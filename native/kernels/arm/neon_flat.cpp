#include "kernels/arm/flat_neon.hpp"
#include "kernels/generic/flat_pack.hpp"

namespace entrollm {

const FlatKernels kNeonFlatKernels = {.pack = pack_flat, .unpack = unpack_flat<FlatLanes>};

}  // namespace entrollm
