// The matrix unit: what lanes hold of its right operand and of its sums.
#pragma once

#include "vector.cuh"

// Instructions per product. Each gives eight columns, and a vector takes two, one per digit.
constexpr int kPanels = (2 * kBatch + 7) / 8;
// Steps whose digits lanes read at a time. One or two vectors leave columns of the matrix unit's
// right operand free, and these hold the digits of the next steps. Each step then has sums of its
// own, since only the columns of its own digits are meaningful.
constexpr int kPhases = kBatch == 1 ? 4 : kBatch == 2 ? 2 : 1;
// Segments that a warp decodes together, to have enough loads in flight.
constexpr int kTogether = 2;
// Sets of sums that a warp keeps, so that one instruction need not wait for the last. Beyond eight
// vectors, a set has enough instructions that wait for none of each other.
constexpr int kSums = kBatch > 8 ? 1 : kPhases > kTogether ? kPhases : kTogether;
// A lane's share of the matrix unit's right operand: digits of up to kPhases steps.
struct Digits {
  u32 words[kPanels][2];

  // Loads them from a lane's address in shared memory.
  __device__ __forceinline__ void load(u32 address) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(words[panel][0]), "=r"(words[panel][1])
                   : "r"(address + panel * 4 * kStepBytes));
    }
  }

  // The offset, in bytes, of a lane's digits among those of kSteps steps. Lanes that would be past
  // the last step or vector read the first again; their results are not used.
  template <int kSteps>
  __device__ static __forceinline__ u32 offset(int lane) {
    constexpr int kStepLanes = kLanes / kPhases;
    const int step = lane / kStepLanes < kSteps ? lane / kStepLanes : 0;
    const int inside = lane % kStepLanes;
    const int vector = inside / 8 < kBatch ? inside / 8 : 0;
    return (step * kBatch + vector) * kStepBytes + inside % 8 * 8;
  }
};

struct Accumulator {
  int sums[kPanels][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] = 0;
    }
  }

  // Adds 16 rows x 32 bytes of weights times every vector's digits.
  __device__ __forceinline__ void multiply(u32 a0, u32 a1, u32 a2, u32 a3, const Digits& digits) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+r"(sums[panel][0]), "+r"(sums[panel][1]), "+r"(sums[panel][2]), "+r"(sums[panel][3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(digits.words[panel][0]),
            "r"(digits.words[panel][1]));
    }
  }

  __device__ __forceinline__ void add(const Accumulator& other, int shift) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] += other.sums[panel][i] >> shift;
    }
  }

  // Replaces the sums by another's.
  __device__ __forceinline__ void take_if(bool chosen, const Accumulator& other) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] = chosen ? other.sums[panel][i] : sums[panel][i];
    }
  }
};

// Adds a warp's sums to those of a tile, whose rows have room for kVectors vectors.
template <int kVectors>
__device__ __forceinline__ void add_sums(Accumulator (&parts)[kSums], int (*out)[kVectors][2]) {
  // A lane holds the sums of both digits of one vector, in the phase that its columns belong to.
  constexpr int kPanelVectors = 4 / kPhases;
  const int lane = threadIdx.x % kLanes;
  const int row = lane >> 2;
  Accumulator& sums = parts[0];
#pragma unroll
  for (int i = 1; i < kSums; ++i) {
    if (kPhases > 1) {
      sums.take_if((lane & 3) / kPanelVectors == i, parts[i]);
    } else {
      sums.add(parts[i], 0);
    }
  }
  if constexpr (kBatch == 1) {
    // Four lanes hold sums of the same rows and digits. Each collects one of them, so that no two
    // lanes add to the same address.
    int (&mine)[4] = sums.sums[0];
    const bool low = lane & 1;
    const bool below = lane & 2;
    const int upper = (low ? mine[1] : mine[0]) + __shfl_xor_sync(~0u, low ? mine[0] : mine[1], 1);
    const int lower = (low ? mine[3] : mine[2]) + __shfl_xor_sync(~0u, low ? mine[2] : mine[3], 1);
    const int sum = (below ? lower : upper) + __shfl_xor_sync(~0u, below ? upper : lower, 2);
    atomicAdd(&out[row + (below ? 8 : 0)][0][low], sum);
  } else {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int vector = panel * 4 + (lane & 3) % kPanelVectors;
      if (vector >= kBatch) continue;
      atomicAdd(&out[row][vector][0], sums.sums[panel][0]);
      atomicAdd(&out[row][vector][1], sums.sums[panel][1]);
      atomicAdd(&out[row + 8][vector][0], sums.sums[panel][2]);
      atomicAdd(&out[row + 8][vector][1], sums.sums[panel][3]);
    }
  }
}
