// What all kernels need: the layout of a matrix on the GPU (docs/research/cuda.md) and a few
// instructions. The compiler defines THREADS, COPIES of the table, and TABLE_AT, the address in
// shared memory where the table begins.
//
// A tile is 16 rows. A span is 72 columns of a tile: three matrix-unit steps of 24 columns. In a
// step, lane 4 g + q holds rows g and g + 8 and the columns 12 h + 3 q + {0, 1, 2} of half h =
// 0, 1. A chunk is a range of a tile's spans, stored contiguously: the two streams (rows g and rows
// g + 8) as rows of 32 words, one per lane, then the starts of segments, the tile's rows (in its
// first chunk), raw words, and patches.
#pragma once

#include "basic.cuh"

constexpr int kStreams = 2;
constexpr int kStepColumns = 24;
constexpr int kSpanColumns = 72;
constexpr int kSpanTriples = 6;   // of one stream
constexpr int kUnitColumns = 64;  // two steps of raw bits; units begin at multiples of this
constexpr int kTableEntries = 256;
constexpr int kWordRowBytes = kLanes * 4;
// In stored streams, the first code begins at this bit.
constexpr int kFirstBit = 7;
// Copies of the table. Lanes that share one may have to wait for each other.
constexpr int kCopies = COPIES;
constexpr int kTableBytes = kTableEntries * kCopies * 4;
constexpr u32 kTableAt = TABLE_AT;
static_assert(kTableAt % kTableBytes == 0, "a masked window must need no addition");
// A window has its next code at this bit, so that masking it gives a table address.
constexpr int kWindowBit = kCopies == 32 ? 7 : kCopies == 16 ? 6 : 5;
static_assert(kCopies * 4 == 1 << kWindowBit && kWindowBit <= kFirstBit);
constexpr u32 kWindowMask = (kTableEntries - 1) << kWindowBit;
// Whether one instruction copies a whole chunk to shared memory. Without, the lanes of a warp copy
// 16 bytes each at a time.
constexpr bool kBulkCopies = __CUDA_ARCH__ >= 900;

// One matrix. Pointers are to device memory. An entry of `chunks` is {offset / 16, size / 16,
// offset of what follows the streams, patches + 65536 * rows of words of the first stream}.
struct Matrix {
  const u8* data;
  const uint4* chunks;
  const u32* table;
  const float* column_scale;
  const u16* bounds;  // where each segment of a tile begins, in spans, and where the last ends
  int rows;
  int tiles;
  int spans;
  Divisor tile_chunks;
  Divisor segments;
  int raw_bits;
  int base;     // the symbol whose raw bits and high part are 0
  int y_begin;  // where its outputs begin in a vector of outputs
  int cta_begin;
  Divisor cta_count;
};

__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// A barrier that waits for copies of one request after another: for the bytes of bulk copies that
// one lane requests, or for each of a warp's lanes to have its pieces.
__device__ __forceinline__ void barrier_init(u64* barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(kBulkCopies ? 1 : kLanes));
  if constexpr (kBulkCopies) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
}

// Copies bytes, a multiple of 16, that the barrier waits for. Only with bulk copies.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 size, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(size), "r"(shared_address(barrier))
      : "memory");
}

// Copies a lane's share of bytes, a multiple of 16. Only without bulk copies.
__device__ __forceinline__ void copy_share(void* to, const void* from, u32 size) {
  const u32 address = shared_address(to);
#pragma unroll 4
  for (u32 at = threadIdx.x % kLanes * 16; at < size; at += kLanes * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + at),
                 "l"(static_cast<const u8*>(from) + at)
                 : "memory");
  }
}

// Copies bytes that the barrier waits for in addition to a chunk that is requested afterwards.
__device__ __forceinline__ void copy_more(void* to, const void* from, u32 size, u64* barrier) {
  if constexpr (kBulkCopies) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(size)
        : "memory");
    copy_bulk(to, from, size, barrier);
  } else {
    copy_share(to, from, size);
  }
}

// Copies the last bytes of a request.
__device__ __forceinline__ void copy_chunk(void* to, const void* from, u32 size, u64* barrier) {
  if constexpr (kBulkCopies) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(size)
                 : "memory");
    copy_bulk(to, from, size, barrier);
  } else {
    copy_share(to, from, size);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
  }
}

__device__ __forceinline__ bool barrier_is_open(u32 address, u32 phase) {
  u32 done;
  if constexpr (kBulkCopies) {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, "
        "p;\n}\n"
        : "=r"(done)
        : "r"(address), "r"(phase)
        : "memory");
  } else {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, "
        "0, "
        "p;\n}\n"
        : "=r"(done)
        : "r"(address), "r"(phase)
        : "memory");
  }
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(u64* barrier, u32 phase) {
  const u32 address = shared_address(barrier);
  while (!barrier_is_open(address, phase)) {
  }
}

// Loads the table from global memory and stores copies of it. With a copy for every lane, no two
// lanes of a warp read the same bank.
class TableCopies {
 public:
  // Requests the entries without waiting for them.
  __device__ __forceinline__ explicit TableCopies(const u32* table) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      entries_[turn] = __ldg(
          &table[min(static_cast<int>(threadIdx.x) + turn * THREADS, kStores - 1) / (kCopies / 4)]);
    }
  }

  // Stores the copies, with the bytes of `add` added to those of each entry.
  __device__ __forceinline__ void store(u8* shared, u32 add) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = threadIdx.x + turn * THREADS;
      const u32 entry = __vadd4(entries_[turn], add);
      if (i < kStores) reinterpret_cast<uint4*>(shared)[i] = make_uint4(entry, entry, entry, entry);
    }
  }

 private:
  static constexpr int kStores = kTableEntries * kCopies / 4;
  static constexpr int kTurns = (kStores + THREADS - 1) / THREADS;
  u32 entries_[kTurns];
};

// Where the table begins. Kernels also use the memory in front of it.
__device__ __forceinline__ u8* table_in(u8* memory) {
  return memory + (kTableAt - shared_address(memory));
}

// The bits of one stream of one lane.
class Stream {
 public:
  __device__ __forceinline__ Stream(const u8* words, u32 start)
      : position_((shared_address(words) >> 2) + start + (kFirstBit - kWindowBit)),
        lane_(threadIdx.x % kLanes * 4),
        // The shuffle keeps the compiler from computing this from two registers at every use.
        copy_(__shfl_sync(~0u, kTableAt | threadIdx.x % kCopies * 4, threadIdx.x % kLanes)) {}

  // Decodes three codes. An entry is the length of the code, then three symbols. A code has at most
  // 8 bits, so three fit in the 25 bits of a window.
  __device__ __forceinline__ void entries(u32* out) {
    const u32 address = ((position_ << 2) & ~(kWordRowBytes - 1u)) | lane_;
    u32 window =
        __funnelshift_r(load_shared(address), load_shared(address + kWordRowBytes), position_);
    out[0] = entry(window);
    window = __funnelshift_r(window, 0, out[0]);
    out[1] = entry(window);
    window = __funnelshift_r(window, 0, out[1]);
    out[2] = entry(window);
    // The sum of three lengths fits in a byte.
    position_ = __dp4a(out[0] + out[1] + out[2], 1u, position_);
  }

 private:
  __device__ __forceinline__ u32 entry(u32 window) const {
    return load_shared((window & kWindowMask) | copy_);
  }

  u32 position_;  // in bits from address 0 of shared memory, in rows of 32 words
  u32 lane_;      // the lane's offset in a row, in bytes
  u32 copy_;      // the lane's copy of the table; its address has no bit in common with a masked
                  // window
};

// Where segment `segment` of a chunk begins in a lane's stream, in bits from the chunk's start.
__device__ __forceinline__ u32 segment_start(const u8* tail, int segment, int stream, int lane) {
  const u16* bases = reinterpret_cast<const u16*>(tail);
  const u8* deltas = tail + 16 + (segment * kStreams + stream) * kLanes;
  return bases[segment] + 2u * deltas[lane];
}

// The tile's rows, which its first chunk holds behind the starts of its segments.
__device__ __forceinline__ const Row* tile_rows(const u8* tail, int segments) {
  return reinterpret_cast<const Row*>(tail + 16 + segments * kStreams * kLanes);
}

// The range of units that hold the raw bits of columns [begin, end).
__device__ __forceinline__ int first_unit(int begin) { return begin / kUnitColumns; }
__device__ __forceinline__ int end_unit(int end) { return (end + kUnitColumns - 1) / kUnitColumns; }

// The raw words of a chunk, and behind them its patches.
__device__ __forceinline__ const u32* chunk_words(const u8* tail, int segments, bool first) {
  return reinterpret_cast<const u32*>(tile_rows(tail, segments) + (first ? kTileRows : 0));
}
