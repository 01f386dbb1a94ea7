// The patches of flat matrices, added to sums in shared memory. The compiler defines BATCH,
// THREADS, and PREPARED (1 if flat_prepare.cu has rounded x).
#pragma once

#include "flat.cuh"
#include "vector.cuh"

namespace {

constexpr bool kPrepared = PREPARED;
// Room for a row's sums. Eight rows begin in different banks where vectors are many.
constexpr int kRowVectors = kBatch >= 4 && kBatch % 8 != 4 ? kBatch + 4 : kBatch;

// The patches of a tile that are a share's. A lane loads its first ones before it multiplies.
class Patches {
 public:
  __device__ __forceinline__ Patches(const FlatMatrix& matrix, const TileHead& head, int index,
                                     int shares)
      : patches_(matrix.patches),
        at_(head.patch_begin + index * kLanes + threadIdx.x % kLanes),
        end_(head.patch_end),
        step_(shares * kLanes) {
    load();
  }

  // Calls add(patch, exists) for each. All lanes call it together, those that have none left with
  // `exists` false.
  template <class Add>
  __device__ __forceinline__ void each(Add add) {
    while (__any_sync(~0u, at_ < end_)) {
      u32 now[kTaken];
      bool exists[kTaken];
#pragma unroll
      for (int i = 0; i < kTaken; ++i) {
        now[i] = taken_[i];
        exists[i] = at_ + i * step_ < end_;
      }
      at_ += kTaken * step_;
      load();
#pragma unroll
      for (int i = 0; i < kTaken; ++i) add(now[i], exists[i]);
    }
  }

 private:
  static constexpr int kTaken = kPrepared ? 2 : 4;

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      taken_[i] = at_ + i * step_ < end_ ? __ldg(&patches_[at_ + i * step_]) : 0;
    }
  }

  const u32* patches_;
  int at_;
  int end_;
  int step_;
  u32 taken_[kTaken];
};

// The parts of a patch.
__device__ __forceinline__ int patch_row(u32 patch) { return patch & 15; }
__device__ __forceinline__ int patch_difference(u32 patch) {
  return static_cast<int>(patch >> 4 & 511) - 256;
}
__device__ __forceinline__ int patch_column(u32 patch) { return patch >> 13; }

// Adds a patch that the lane alone has, with digits in shared memory.
__device__ __forceinline__ void add_patch(u32 patch, const u8* digits, int (*out)[kRowVectors][2]) {
  const int column = patch_column(patch);
  const int inside = column % kFlatStepColumns;
  const u8* at = digits + column / kFlatStepColumns * (kStepBytes * kBatch) + inside % 16 / 4 * 8 +
                 inside / 16 * 4 + inside % 4;
#pragma unroll
  for (int vector = 0; vector < kBatch; ++vector) {
#pragma unroll
    for (int digit = 0; digit < 2; ++digit) {
      atomicAdd(
          &out[patch_row(patch)][vector][digit],
          patch_difference(patch) * static_cast<signed char>(at[vector * kStepBytes + digit * 32]));
    }
  }
}

// Adds the patches of neighbouring lanes, one vector per lane, with numbers in global memory.
// Several are requested before the first is added.
__device__ __forceinline__ void add_patches_together(u32 patch, bool exists, const u16* numbers,
                                                     int (*out)[kRowVectors][2]) {
  constexpr int kAtOnce = kLanes / kBatch;  // patches that are added by different lanes
  constexpr int kTurns = 8;
  const int lane = threadIdx.x % kLanes;
  const int place = lane / kBatch;
  const int vector = lane % kBatch;
  const u32 present = __ballot_sync(~0u, exists);
  const int first_lane = __ffs(present) - 1;
  const int count = __popc(present);
  for (int first = 0; first < count; first += kAtOnce * kTurns) {
    u32 its[kTurns];
    int number[kTurns];
    bool is[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int from = first + turn * kAtOnce + place;
      its[turn] = __shfl_sync(~0u, patch, (first_lane + from) & 31);
      is[turn] = from < count && place < kAtOnce;
      if (is[turn]) number[turn] = __ldcg(&numbers[patch_column(its[turn]) * kBatch + vector]);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (!is[turn]) continue;
      const int value = number[turn] - static_cast<int>(kBias);
      const int high = (value + 128) >> 8;
      int* sums = out[patch_row(its[turn])][vector];
      atomicAdd(&sums[0], patch_difference(its[turn]) * high);
      atomicAdd(&sums[1], patch_difference(its[turn]) * (value - 256 * high));
    }
  }
}

}  // namespace
