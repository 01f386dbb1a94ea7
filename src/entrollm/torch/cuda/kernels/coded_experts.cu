// y = W x where every vector of outputs has a coded matrix of its own, that of an expert which the
// model has chosen by then: the products of a layer of experts in one launch. The compiler defines
// what coded_work.cuh needs.
#include "coded_work.cuh"
#include "expert_tasks.cuh"

namespace {

struct ExpertLaunch {
  Launch product;          // without matrices
  const Matrix* matrices;  // those of the first expert, of the second, and so on
  Choices choices;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    multiply_coded_experts(const __grid_constant__ ExpertLaunch launch) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ State state;
  __shared__ Task<Matrix, kBatch> task;
  static_assert(sizeof(state) + sizeof(task) + 16 <= STATE_BYTES, "plans must leave room for both");
  const Launch& product = launch.product;
  wait_for_previous();  // which may have chosen the experts
  const int block =
      find_task<kType>(launch.choices, launch.matrices, product.y, product.y_stride, task);
  if (block < 0) return;
  const auto vector = [&](int i) {
    return Vector(product.x, task.input(i), product.columns, task.matrix.column_scale);
  };
  multiply_matrix(product, task.matrix, block, task.groups, Outputs{task.vectors, task.outputs},
                  state, memory, vector, [] {});
}
