// The matrix unit: what lanes hold of its operands, and the products of decoded spans and of raw
// bits with all vectors' digits.
#pragma once

#include "accumulator.cuh"
#include "common.cuh"

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
