// y = W x where every vector of outputs has a matrix with group scales of its own, that of an
// expert which the model has chosen by then: the products of a layer of experts in one launch. The
// compiler defines what grouped_work.cuh needs.
#include "expert_tasks.cuh"
#include "grouped_work.cuh"

namespace {

struct Part {
  Matrix matrix;
  int y_begin;  // where its outputs begin in a vector of outputs
  int unused;
};

struct Launch {
  Vectors vectors;
  const Part* parts;  // those of the first expert, of the second, and so on
  Choices choices;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_grouped_experts(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) float4 panel[];
  __shared__ Task<Part, kBatch> task;
  const Vectors& vectors = launch.vectors;
  wait_for_previous();  // which may have chosen the experts
  const int block =
      find_task<TYPE>(launch.choices, launch.parts, vectors.y, vectors.y_stride, task);
  if (block < 0) return;
  const Work work{task.matrix.matrix,  vectors,      block,        task.groups,
                  task.matrix.y_begin, task.vectors, task.outputs, task.inputs};
  multiply_rows(work, panel, [] {});
}
