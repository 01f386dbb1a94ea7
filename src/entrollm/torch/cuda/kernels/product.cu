// y = W x for a few vectors and coded matrices. The compiler defines what coded_work.cuh needs.
#include "coded_work.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    multiply(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ State state;
  int index = 0;
  while (index + 1 < launch.count &&
         static_cast<int>(blockIdx.x) >= launch.matrices[index + 1].cta_begin)
    ++index;
  const Matrix& matrix = launch.matrices[index];
  const auto vector = [&](int i) {
    return Vector(launch.x, i, launch.columns, matrix.column_scale);
  };
  multiply_matrix(launch, matrix, blockIdx.x - matrix.cta_begin, matrix.cta_count,
                  Outputs{kBatch, nullptr}, state, memory, vector, [] { wait_for_previous(); });
}
