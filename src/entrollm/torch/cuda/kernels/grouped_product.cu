// y = W x for a few vectors and a matrix with group scales. The compiler defines what
// grouped_work.cuh needs.
#include "grouped_work.cuh"

namespace {

struct Launch {
  Matrix matrix;
  Vectors vectors;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_grouped(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) float4 panel[];
  const int block = blockIdx.x;
  const Work work{launch.matrix, launch.vectors, block,  static_cast<int>(gridDim.x), 0,
                  kBatch,        nullptr,        nullptr};
  multiply_rows(work, panel, [] { wait_for_previous(); });
}
