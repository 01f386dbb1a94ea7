// What the kernels share: the layout of a matrix on the GPU (docs/research/cuda.md) and a few instructions.
//
// A tile is 16 rows. A group is 72 columns of a tile: three matrix-unit steps of 24 columns. In a
// step, lane 4 g + q holds rows g and g + 8 and the columns 12 h + 3 q + {0, 1, 2} of half h =
// 0, 1. A chunk is a range of a tile's groups and lies in one piece: each of the two streams (rows
// g and rows g + 8) as rows of 32 words, one per lane, then the starts of segments, what belongs to
// the tile's rows, raw words, and patches.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int kLanes = 32;
constexpr int kTileRows = 16;
constexpr int kStreams = 2;
constexpr int kTripleColumns = 3;
constexpr int kStepColumns = 24;
constexpr int kGroupColumns = 72;
constexpr int kGroupTriples = 6;  // of one stream
constexpr int kUnitColumns = 64;  // two steps of raw bits; units begin at multiples of this
constexpr int kTableEntries = 256;
constexpr int kTableBytes = kTableEntries * kLanes * 4;
constexpr int kWordRowBytes = kLanes * 4;
// A window has its next code at this bit, so that masking it gives a table address.
constexpr int kWindowBit = 7;
constexpr u32 kWindowMask = (kTableEntries - 1) << kWindowBit;
// A step's activations of one vector: high digits, low digits; 4 column quarters; 2 halves; 4
// bytes.
constexpr int kStepBytes = 64;
constexpr int kMaxMatrices = 4;

// Divides by a number that stays the same, without the slow unit of conversions and reciprocals;
// the product of both numbers is below 2^31.
struct Divisor {
  int value;
  u32 inverse;  // 2^31 / value, rounded up

  __device__ __forceinline__ operator int() const { return value; }
  __device__ __forceinline__ int divide(int x) const { return __umulhi(2 * x, inverse); }
};

// One matrix. Pointers are to device memory; a chunk is {offset / 16, size / 16, offset of what
// follows the streams, patches + 65536 * rows of words of the first stream}.
struct Matrix {
  const u8* data;
  const uint4* chunks;
  const u32* table;
  const float* column_scale;
  const u16* bounds;  // where the segments of a tile begin, in groups, and where the last ends
  int rows;
  int tiles;
  int groups;
  Divisor tile_chunks;
  Divisor segments;
  int raw_bits;
  int base;     // of a symbol whose raw bits and high part are 0
  int y_begin;  // where its outputs begin in a vector of outputs
  int cta_begin;
  Divisor cta_count;
};

// A row of a tile.
struct Row {
  int index;  // in the matrix
  float scale;
  float offset;
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// What a thread saw or wrote before this, those of its block see that synchronize with it after.
__device__ __forceinline__ void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void copy_bytes(void* to, const void* from, u32 size, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(size), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void copy_chunk(void* to, const void* from, u32 size, u64* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(size)
               : "memory");
  copy_bytes(to, from, size, barrier);
}

// Copies what the same barrier waits for besides a chunk that is asked for afterwards.
__device__ __forceinline__ void copy_more(void* to, const void* from, u32 size, u64* barrier) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(size)
               : "memory");
  copy_bytes(to, from, size, barrier);
}

__device__ __forceinline__ void barrier_wait(u64* barrier, u32 phase) {
  const u32 address = shared_address(barrier);
  u32 done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, "
        "p;\n}\n"
        : "=r"(done)
        : "r"(address), "r"(phase)
        : "memory");
  } while (!done);
}

// The table, on its way from global memory to a copy for every lane, so that no two lanes of a warp
// read the same bank.
class TableCopies {
 public:
  // Asks for the entries and waits for none.
  __device__ __forceinline__ explicit TableCopies(const u32* table) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      entries_[turn] = __ldg(
          &table[min(static_cast<int>(threadIdx.x) + turn * THREADS, kStores - 1) / (kLanes / 4)]);
    }
  }

  // Bytes of `add` are added to those of every entry.
  __device__ __forceinline__ void store(u8* shared, u32 add) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = threadIdx.x + turn * THREADS;
      const u32 entry = __vadd4(entries_[turn], add);
      if (i < kStores) reinterpret_cast<uint4*>(shared)[i] = make_uint4(entry, entry, entry, entry);
    }
  }

 private:
  static constexpr int kStores = kTableEntries * kLanes / 4;
  static constexpr int kTurns = (kStores + THREADS - 1) / THREADS;
  u32 entries_[kTurns];
};

// Stores a value in the type of the output: 0 float32, 1 bfloat16, 2 float16.
__device__ __forceinline__ void store_value(void* out, long long at, float value, int type) {
  if (type == 0) {
    static_cast<float*>(out)[at] = value;
    return;
  }
  u16 bits;
  if (type == 1) {
    asm("{\n .reg .b16 h;\n cvt.rn.bf16.f32 h, %1;\n mov.b16 %0, h;\n}" : "=h"(bits) : "f"(value));
  } else {
    asm("{\n .reg .b16 h;\n cvt.rn.f16.f32 h, %1;\n mov.b16 %0, h;\n}" : "=h"(bits) : "f"(value));
  }
  static_cast<u16*>(out)[at] = bits;
}

// Where the table lies: at a multiple of its size, so that a masked window needs no addition.
// Kernels use what is in front of it too.
__device__ __forceinline__ u8* table_place(u8* memory) {
  return memory + (-shared_address(memory) & (kTableBytes - 1));
}

// The bits of one stream of one lane.
class Stream {
 public:
  __device__ __forceinline__ Stream(const u8* table, const u8* words, u32 start)
      : position_((shared_address(words) >> 2) + start),
        lane_(threadIdx.x % kLanes * 4),
        // Taken through a shuffle, or the compiler would put it together from two registers at
        // every use.
        copy_(__shfl_sync(~0u, shared_address(table) | threadIdx.x % kLanes * 4,
                          threadIdx.x % kLanes)) {}

  // The entries of the next three codes: the code's length, then three symbols. Codes have at most
  // 8 bits, so that three fit the 25 bits of a window.
  __device__ __forceinline__ void entries(u32* out) {
    const u32 address = ((position_ << 2) & ~(kWordRowBytes - 1u)) | lane_;
    u32 window =
        __funnelshift_r(load_shared(address), load_shared(address + kWordRowBytes), position_);
    out[0] = entry(window);
    window = __funnelshift_r(window, 0, out[0]);
    out[1] = entry(window);
    window = __funnelshift_r(window, 0, out[1]);
    out[2] = entry(window);
    // Three lengths stay within a byte.
    position_ = __dp4a(out[0] + out[1] + out[2], 1u, position_);
  }

 private:
  __device__ __forceinline__ u32 entry(u32 window) const {
    return load_shared((window & kWindowMask) | copy_);
  }

  u32 position_;  // in bits from address 0 of shared memory, in rows of 32 words
  u32 lane_;      // the lane's place in a row, in bytes
  u32 copy_;      // the lane's copy of the table, which has no address bits in common with a masked
                  // window
};

// Where segment `segment` of a chunk begins in a lane's stream, in bits from the chunk's start.
__device__ __forceinline__ u32 segment_start(const u8* tail, int segment, int stream, int lane) {
  const u16* bases = reinterpret_cast<const u16*>(tail);
  const u8* deltas = tail + 16 + (segment * kStreams + stream) * kLanes;
  return bases[segment] + 2u * deltas[lane];
}

// What a tile's first chunk says of the tile's rows, behind the starts of its segments.
__device__ __forceinline__ const Row* tile_rows(const u8* tail, int segments) {
  return reinterpret_cast<const Row*>(tail + 16 + segments * kStreams * kLanes);
}

// The units that have raw bits of columns [begin, end).
__device__ __forceinline__ int first_unit(int begin) { return begin / kUnitColumns; }
__device__ __forceinline__ int end_unit(int end) { return (end + kUnitColumns - 1) / kUnitColumns; }

// The raw words of a chunk, and behind them its patches.
__device__ __forceinline__ const u32* chunk_words(const u8* tail, int segments, bool first) {
  return reinterpret_cast<const u32*>(tile_rows(tail, segments) + (first ? kTileRows : 0));
}
