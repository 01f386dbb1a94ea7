// y = W x where every vector of outputs has a flat matrix of its own, that of an expert which the
// model has chosen by then: the products of a layer of experts in one launch. The compiler defines
// what flat_work.cuh needs.
#include "expert_tasks.cuh"
#include "flat_work.cuh"

namespace {

struct ExpertLaunch {
  Launch product;              // without matrices
  const FlatMatrix* matrices;  // those of the first expert, of the second, and so on
  Choices choices;
};

struct ExpertState {
  State state;
  Task<FlatMatrix, kBatch> task;
};

static_assert(sizeof(ExpertState) <= STATE_BYTES, "plans of shared memory must leave room for it");

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_experts(const __grid_constant__ ExpertLaunch launch) {
  extern __shared__ __align__(128) u8 memory[];
  ExpertState& all = *reinterpret_cast<ExpertState*>(memory);
  u8* digits = memory + STATE_BYTES;
  const Launch& product = launch.product;
  wait_for_previous();  // which may have chosen the experts
  const int group =
      find_task<kType>(launch.choices, launch.matrices, product.y, product.y_stride, all.task);
  if (group < 0) return;
  const FlatMatrix& matrix = all.task.matrix;
  const int groups = all.task.groups;
  const int tiles = group < matrix.tiles ? all.task.groups.divide(matrix.tiles - 1 - group) + 1 : 0;
  const Work work{matrix,         product,          group,           groups, tiles, 0,
                  matrix.stripes, all.task.vectors, all.task.outputs};
  Reader reader(work);
  Fields ahead[kAhead];
  reader.next(ahead[0]);
  const auto read_ahead = [&] {
#pragma unroll
    for (int i = 1; i < kAhead; ++i) reader.next(ahead[i]);
  };
  begin_block(work, all.state);
  const FlatDigits out{digits, matrix.stripes * (kStripeColumns / 4)};
  const auto vector = [&](int i) {
    return Vector(product.x, all.task.input(i), product.columns, matrix.column_scale);
  };
  round_vectors(vector, out, all.state.rounded, read_ahead);
  __syncthreads();
  let_next_begin();
  multiply_tiles(work, all.state, digits, reader, ahead, 0);
}
