// What dispatch needs to know of the AMX kernels.
#pragma once

namespace entrollm {

// Whether the processor has AMX with int8 products and the system lets this process use it.
bool runs_amx();

}  // namespace entrollm
