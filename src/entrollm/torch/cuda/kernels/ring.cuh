// A ring of slots in shared memory. Chunks are copied there ahead of the warps that decode them,
// and the last warp to use a chunk requests the chunk that takes its slot.
#pragma once

#include "common.cuh"

constexpr int kMaxBounds = 257;

// The position of the segments that a warp takes at a time, among all that its block works on.
struct Position {
  int chunk;    // counted from the block's first
  int segment;  // of the chunk
  int slot;
  u32 round;    // chunks that were in the slot before
  int in_tile;  // the chunk's index in its tile
  int tile;     // counted from the block's first

  // `first` is the first of the segments, counted from the block's first.
  __device__ __forceinline__ Position(int first, const Matrix& matrix, const Divisor& slots) {
    chunk = matrix.segments.divide(first);
    segment = first - chunk * matrix.segments;
    round = slots.divide(chunk);
    slot = chunk - round * slots;
    tile = matrix.tile_chunks.divide(chunk);
    in_tile = chunk - tile * matrix.tile_chunks;
  }
};

__device__ __forceinline__ uint4 from_lane(const uint4& value, int lane) {
  return make_uint4(__shfl_sync(~0u, value.x, lane), __shfl_sync(~0u, value.y, lane),
                    __shfl_sync(~0u, value.z, lane), __shfl_sync(~0u, value.w, lane));
}

// Requests the first chunks of slots [begin, end). All lanes of a warp call this, and lane i knows
// the chunk of slot i.
template <class Stored, class Fetch>
__device__ __forceinline__ void fetch_first(int begin, int end, const Stored& stored, Fetch fetch) {
  const int lane = threadIdx.x % kLanes;
  if constexpr (kBulkCopies) {
    if (lane >= begin && lane < end) fetch(lane, stored);
  } else {
    for (int slot = begin; slot < end; ++slot) fetch(slot, from_lane(stored, slot));
  }
}

// Requests a chunk if lane 0 says so. All lanes of a warp call this with the same chunk.
template <class Fetch>
__device__ __forceinline__ void fetch_next(bool wanted, Fetch fetch) {
  if constexpr (kBulkCopies) {
    if (threadIdx.x % kLanes == 0 && wanted) fetch();
  } else {
    const bool all = __shfl_sync(~0u, wanted, 0);
    __syncwarp();  // shows the other lanes what lane 0's fence made visible
    if (all) fetch();
  }
  __syncwarp();
}

template <int kSlots>
struct Ring {
  uint4 chunks[kSlots];
  u64 barriers[kSlots];
  u32 rounds[kSlots];          // chunks that were requested
  u32 done[kSlots];            // shares of the chunk in the slot that are decoded
  u16 bounds[kMaxBounds + 3];  // of the matrix

  // One thread per slot calls this: the one that requests the slot's first chunk. The block must
  // meet at a barrier before any thread waits for a chunk.
  __device__ __forceinline__ void open(int slot) {
    barrier_init(&barriers[slot]);
    rounds[slot] = done[slot] = 0;
  }

  // Requests a chunk. One lane calls this, or without bulk copies all lanes of a warp.
  __device__ __forceinline__ void fetch(int slot, u8* data, const Matrix& matrix, uint4 stored) {
    const bool tells = kBulkCopies || threadIdx.x % kLanes == 0;
    if (tells) chunks[slot] = stored;
    copy_chunk(data, matrix.data + static_cast<u64>(stored.x) * 16, stored.y * 16, &barriers[slot]);
    if (tells) {
      fence_block();
      ++*static_cast<volatile u32*>(&rounds[slot]);
    }
  }

  // Waits for a chunk; returns its entry in the table of chunks.
  __device__ __forceinline__ uint4 wait(const Position& at) {
    // A barrier can only tell odd rounds from even ones, so the wait must not begin before the
    // chunk was requested.
    while (*static_cast<volatile u32*>(&rounds[at.slot]) <= at.round) __nanosleep(32);
    barrier_wait(&barriers[at.slot], at.round & 1);
    return chunks[at.slot];
  }

  // One lane calls this when its warp has finished a share; returns true for the chunk's last.
  __device__ __forceinline__ bool release(const Position& at, int shares) {
    fence_block();
    if (atomicAdd(&done[at.slot], 1) + 1 != static_cast<u32>(shares)) return false;
    done[at.slot] = 0;
    fence_block();
    return true;
  }
};
