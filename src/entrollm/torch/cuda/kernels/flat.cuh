// Flat matrices: symbols in fields of 1 to 8 bits. docs/research/cuda.md describes the layout.
//
// A tile is 16 rows whose fields have one width. A stripe is 256 columns of a tile, or eight steps
// of the matrix unit, and as many rows of 32 pieces of 16 bytes as a field has bits; lane i holds
// piece i of each row. Unpacked, a lane has 32 words: of every step, row lane / 4 and row
// lane / 4 + 8, of its first 16 columns and of its last 16, each four neighbours. Of a field, the
// lowest bits are in the widest of the sets of 4, 2 and 1 bits that make up its width. The compiler
// defines MIN_BITS and MAX_BITS of the launch's fields.
#pragma once

#include "basic.cuh"

constexpr int kStripeColumns = 256;
constexpr int kStripeSteps = 8;
constexpr int kStripeWords = 4 * kStripeSteps;
constexpr int kFlatStepColumns = 32;
constexpr int kMostBits = 8;
constexpr int kMinBits = MIN_BITS;
constexpr int kMaxBits = MAX_BITS;

// What a tile has besides fields.
struct TileHead {
  Row rows[kTileRows];
  int base;  // the symbol whose field is 0
  int patch_begin;
  int patch_end;
  int unused;
};

// One matrix. Pointers are to device memory.
struct FlatMatrix {
  const uint4* data;
  const TileHead* heads;
  const u32* patches;  // 4 bits of row, 9 of difference + 256, and the column
  const float* column_scale;
  int rows;
  int tiles;
  int stripes;
  int tile_ends[kMostBits];  // where the tiles with fields of 1, 2, .. bits end
  int y_begin;               // where its outputs begin in a vector of outputs
  int cta_begin;
  Divisor groups;  // of blocks: group g has tiles g, g + groups, and so on
};

// Where a tile's fields begin, for a lane.
struct TilePlace {
  const uint4* data;
  int bits;

  __device__ __forceinline__ TilePlace(const FlatMatrix& matrix, int tile) {
    bits = kMinBits;
    if (kMinBits == kMaxBits) {
      data = matrix.data + static_cast<long long>(tile) * matrix.stripes * (kMinBits * kLanes);
    } else {
      int before = 0;
      int rows = 0;
#pragma unroll
      for (int width = kMinBits; width <= kMaxBits; ++width) {
        const int end = matrix.tile_ends[width - 1];
        if (tile >= before) bits = width;
        rows += max(0, min(tile, end) - before) * width;
        before = end;
      }
      data = matrix.data + static_cast<long long>(rows) * matrix.stripes * kLanes;
    }
    data += threadIdx.x % kLanes;
  }
};

// A lane's pieces of a stripe.
struct Fields {
  uint4 pieces[kMaxBits];

  // Loads them past the first-level cache.
  __device__ __forceinline__ void load(const uint4* from, int bits) {
#pragma unroll
    for (int i = 0; i < kMaxBits; ++i) {
      if (i >= kMinBits && i >= bits) break;
      uint4& to = pieces[i];
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                   : "l"(from + i * kLanes));
    }
  }

  __device__ __forceinline__ u32 word(int i) const {
    const uint4& piece = pieces[i / 4];
    return i % 4 == 0 ? piece.x : i % 4 == 1 ? piece.y : i % 4 == 2 ? piece.z : piece.w;
  }

  // Unpacks word `at`, of four neighbours, from fields of kBits bits. `at` must be known when the
  // kernel is compiled.
  template <int kBits>
  __device__ __forceinline__ u32 unpacked(int at) const {
    if constexpr (kBits == 8) return word(at);
    u32 found = 0;
    if constexpr ((kBits & 4) != 0) found = set<4, 0>(0, at);
    if constexpr ((kBits & 2) != 0) found |= set<2, kBits & 4>(kBits & 4, at);
    if constexpr ((kBits & 1) != 0) found |= set<1, kBits & 6>(kBits & 6, at);
    return found;
  }

 private:
  // The bits of a set, shifted to where they belong; its words follow those of `before` bits.
  template <int kWidth, int kPlace>
  __device__ __forceinline__ u32 set(int before, int at) const {
    constexpr int kPerWord = 8 / kWidth;
    constexpr u32 kMask = (((1u << kWidth) - 1) << kPlace) * 0x01010101u;
    const u32 stored = word(before * 4 + at / kPerWord);
    const int right = at % kPerWord * kWidth - kPlace;
    return (right >= 0 ? stored >> right : stored << -right) & kMask;
  }
};
