// Lossless bfloat16 matrices: exponents in fields of 3 bits, and signs and mantissas in bytes.
// docs/research/cuda.md describes the layout.
//
// A tile is 16 rows, and a stripe is 256 columns of it: 11 rows of 32 pieces of 16 bytes, of which
// lane i holds piece i. The first eight have bytes, a sign above seven bits of mantissa, and the
// other three exponents. A lane has 16 columns of four quarters of the stripe: of each step of the
// matrix unit, row lane / 4 and row lane / 4 + 8, four neighbours each.
#pragma once

#include "basic.cuh"

constexpr int kStripeColumns = 256;
constexpr int kStripePieces = 11;
constexpr int kBytePieces = 8;
constexpr int kQuarters = 4;
constexpr int kQuarterColumns = 64;
constexpr int kQuarterSteps = 4;
constexpr int kStepWords = 4;   // pairs of weights that a lane has of a step
constexpr int kWordFields = 5;  // in each half of a word of exponents, above one spare bit

// One matrix. Pointers are to device memory.
struct LosslessMatrix {
  const uint4* data;
  const int* bases;         // of each tile the exponent whose field is 0
  const int* patch_begins;  // of each row of all tiles, and where the last ends
  const u32* patches;       // the bits of a weight above its column, by row and column
  int rows;
  int stripes;
  int tile_begin;  // tiles of the matrices before
  int y_begin;     // where its outputs begin in a vector of outputs
};

// A lane's pieces of a stripe.
struct Stripe {
  uint4 pieces[kStripePieces];

  // Loads a piece past the first-level cache; `from` is the lane's first.
  __device__ __forceinline__ void load(int piece, const uint4* from) {
    uint4& to = pieces[piece];
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from + piece * kLanes));
  }

  // Unpacks the pairs of a quarter, by step, to words of bfloat16 in the order of the matrix unit:
  // the first two columns of either row, then the others. `base` is a tile's in both halves, where
  // exponents are.
  template <int kQuarter>
  __device__ __forceinline__ void unpack(u32 base, u32 (&out)[kQuarterSteps][kStepWords]) const {
    constexpr u32 kSignMantissa = 0x807f807fu;
    const u32 exponents[3] = {exponent_word(3 * kQuarter), exponent_word(3 * kQuarter + 1),
                              exponent_word(3 * kQuarter + 2)};
#pragma unroll
    for (int step = 0; step < kQuarterSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kStepWords; ++i) {
        const u32 bytes = word((kQuarter * kQuarterSteps + step) * 2 + i % 2);
        const u32 twice = __byte_perm(bytes, 0, i < 2 ? 0x1100 : 0x3322);
        out[step][i] = (twice & kSignMantissa) | (fields(exponents, step * kStepWords + i) + base);
      }
    }
  }

 private:
  __device__ __forceinline__ u32 word(int i) const {
    const uint4& piece = pieces[i / 4];
    return i % 4 == 0 ? piece.x : i % 4 == 1 ? piece.y : i % 4 == 2 ? piece.z : piece.w;
  }

  __device__ __forceinline__ u32 exponent_word(int i) const { return word(kBytePieces * 4 + i); }

  // The fields of a pair, shifted to where exponents are. The last pair of a quarter is in the
  // spare bits of its three words.
  __device__ static __forceinline__ u32 fields(const u32 (&words)[3], int pair) {
    constexpr u32 kSpare = 0x00010001u;
    if (pair == 3 * kWordFields) {
      return (words[0] & kSpare) << 7 | (words[1] & kSpare) << 8 | (words[2] & kSpare) << 9;
    }
    const int place = pair % kWordFields;
    // One shift brings the two highest fields to the places of the two lowest.
    const u32 stored = place < 3 ? words[pair / kWordFields] : words[pair / kWordFields] >> 9;
    const int low = place % 3 * 3 + 1;
    return (stored & (0x00070007u << low)) << (7 - low);
  }
};

// An exponent in both halves of a word.
__device__ __forceinline__ u32 both_halves(int exponent) {
  return static_cast<u32>(exponent) * ((1u << 7) | (1u << 23));
}
