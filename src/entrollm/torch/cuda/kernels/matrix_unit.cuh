// The matrix unit: what lanes hold of its operands, and the products of decoded spans and of raw
// bits with all vectors' digits.
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
// Sets of sums that a warp keeps, so that one instruction need not wait for the last.
constexpr int kSums = kPhases > kTogether ? kPhases : kTogether;
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

// Decodes and multiplies spans of kCount segments together.
template <int kCount>
__device__ __forceinline__ void multiply_spans(Stream (&streams)[kTogether][kStreams],
                                               u32 (&activations)[kTogether], int first, int spans,
                                               Accumulator (&sums)[kSums]) {
  constexpr int kStep = kStepBytes * kBatch;
  constexpr int kSteps = kSpanColumns / kStepColumns;
  constexpr int kFirst = kPhases < kSteps ? kPhases : kSteps;
  const int lane = threadIdx.x % kLanes;
  // For all loads of a span but the last, and for the last, which may be of fewer steps.
  const u32 offset = Digits::offset<kFirst>(lane);
  const u32 last_offset = Digits::offset<(kSteps - 1) % kPhases + 1>(lane);
#pragma unroll 1
  for (int i = 0; i < spans; ++i) {
    u32 entries[kCount][kStreams][kSpanTriples];
    Digits digits[kCount];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int s = 0; s < kStreams; ++s) streams[first + k][s].entries(entries[k][s] + half * 3);
      }
      // The first half holds the first step and a part of the second.
#pragma unroll
      for (int step = half; step <= 2 * half; ++step) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const u32(&e)[kStreams][kSpanTriples] = entries[k];
          if (step % kPhases == 0) {
            digits[k].load(activations[first + k] + step * kStep +
                           (step + kPhases < kSteps ? offset : last_offset));
          }
          sums[kPhases > 1 ? step % kPhases : first + k].multiply(
              e[0][2 * step], e[1][2 * step], e[0][2 * step + 1], e[1][2 * step + 1], digits[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) activations[first + k] += 3 * kStep;
  }
}

// Multiplies one set of kBits raw bits per symbol in units [begin, end). After a shift, a symbol's
// bits are at the top of a byte, as value * 2^(8 - kBits).
template <int kBits>
__device__ __forceinline__ void multiply_raw(const u32* words, int begin, int end, u32 activations,
                                             int lane, int scale_bits,
                                             Accumulator (&total)[kSums]) {
  constexpr u32 kMask = ((0xff00u >> kBits) & 0xffu) * 0x01010101u;
  constexpr int kPerWord = 8 / kBits;
  constexpr int kUnitBytes = 2 * kStepBytes * kBatch;
  Accumulator sums[2];
  sums[0].clear();
  sums[1].clear();
  words += begin * kBits * kLanes + lane;
  activations += begin * kUnitBytes;
  const u32 offset = Digits::offset<kPhases == 1 ? 1 : 2>(lane);
#pragma unroll 2
  for (int unit = begin; unit < end; ++unit) {
    u32 a[8];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const u32 word = words[i * kLanes];
#pragma unroll
      for (int m = 0; m < kPerWord; ++m) a[i * kPerWord + m] = (word << (kBits * m)) & kMask;
    }
    Digits digits;
    digits.load(activations + offset);
    sums[0].multiply(a[0], a[1], a[2], a[3], digits);
    if (kPhases == 1) digits.load(activations + offset + kStepBytes * kBatch);
    sums[1].multiply(a[4], a[5], a[6], a[7], digits);
    words += kBits * kLanes;
    activations += kUnitBytes;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) total[i].add(sums[i], 8 - kBits - scale_bits);
}
