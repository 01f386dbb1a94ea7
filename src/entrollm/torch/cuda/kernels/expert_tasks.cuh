// Which block of a launch multiplies by which expert, where the model has chosen experts on the
// GPU. The compiler defines THREADS.
#pragma once

#include "basic.cuh"

namespace {

// Vectors of outputs at most.
constexpr int kMostOutputs = 128;
static_assert(kMostOutputs <= THREADS);

// The experts of all vectors of outputs.
struct Choices {
  const long long* chosen;  // of every vector of outputs; none if there is no such expert
  int experts;
  int outputs;     // vectors
  Divisor parts;   // matrices of an expert, one below the other
  Divisor shared;  // vectors of outputs that have one input, and are neighbours
};

// What a block works on: a matrix, and up to kVectors of the outputs that have chosen its expert.
template <class Matrix, int kVectors>
struct Task {
  Matrix matrix;
  Divisor groups;  // of blocks that share the task
  int vectors;     // that exist
  int outputs[kVectors];
  int inputs[kVectors];
  int chosen[kMostOutputs];
  u32 leaders[kMostOutputs / kLanes];  // a bit for every output that is the first of a task

  // Where the input of a vector is. Vectors that do not exist have that of the first.
  __device__ __forceinline__ int input(int vector) const {
    return inputs[vector < vectors ? vector : 0];
  }
};

// Writes zeros where no expert is chosen; `chosen` is that of output threadIdx.x, if there is one.
// All blocks call this.
template <int kType>
__device__ __forceinline__ void clear_unchosen(const int* all, int outputs, int chosen, void* y,
                                               int y_stride) {
  if (!__syncthreads_or(chosen < 0)) return;
  for (int output = 0; output < outputs; ++output) {
    if (all[output] >= 0) continue;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < y_stride; i += gridDim.x * THREADS) {
      store_value(y, static_cast<long long>(output) * y_stride + i, 0.0f, kType);
    }
  }
}

// Finds the task of a block; every task gets as many blocks. Returns the block's number among those
// of its task, or -1 if it has none. All threads of all blocks call this, after
// wait_for_previous().
template <int kType, class Matrix, int kVectors>
__device__ __forceinline__ int find_task(const Choices& choices, const Matrix* matrices, void* y,
                                         int y_stride, Task<Matrix, kVectors>& task) {
  const int output = threadIdx.x;
  const bool exists = output < choices.outputs;
  int mine = 0;
  if (exists) {
    const long long expert = __ldcg(&choices.chosen[output]);
    mine = expert >= 0 && expert < choices.experts ? static_cast<int>(expert) : -1;
    task.chosen[output] = mine;
  }
  if (output == 0) task.vectors = 0;
  clear_unchosen<kType>(task.chosen, choices.outputs, mine, y, y_stride);
  const bool chooses = exists && mine >= 0;
  int rank = 0;  // among the outputs of the same expert
  if (chooses) {
    for (int i = 0; i < output; ++i) rank += task.chosen[i] == mine;
  }
  const bool leads = chooses && rank % kVectors == 0;
  const u32 leaders = __ballot_sync(~0u, leads);
  if (output < kMostOutputs && output % kLanes == 0) task.leaders[output / kLanes] = leaders;
  const int tasks = choices.parts * __syncthreads_count(leads);
  if (tasks == 0) return -1;
  const int groups = max(1, static_cast<int>(gridDim.x) / tasks);
  const int index = blockIdx.x / groups;
  if (index >= tasks) return -1;
  // All threads find the output that leads the task.
  int before = choices.parts.divide(index);
  const int part = index - before * choices.parts;
  int leader = 0;
#pragma unroll
  for (int i = 0; i < kMostOutputs / kLanes; ++i) {
    const int count = __popc(task.leaders[i]);
    if (before >= 0 && before < count) leader = i * kLanes + __fns(task.leaders[i], 0, before + 1);
    before -= count;
  }
  const int expert = task.chosen[leader];
  if (chooses && mine == expert && output >= leader) {
    int place = 0;
    for (int i = leader; i < output; ++i) place += task.chosen[i] == mine;
    if (place < kVectors) {
      task.outputs[place] = output;
      task.inputs[place] = choices.shared.divide(output);
      atomicAdd(&task.vectors, 1);
    }
  }
  constexpr int kWords = sizeof(Matrix) / 4;
  if (output < kWords) {
    reinterpret_cast<u32*>(&task.matrix)[output] =
        __ldg(reinterpret_cast<const u32*>(&matrices[expert * choices.parts + part]) + output);
  }
  if (output == 0) task.groups = {groups, ((1u << 31) + groups - 1) / groups};
  __syncthreads();
  return blockIdx.x - index * groups;
}

}  // namespace
