// Rounding to the paths of a trellis, with a row in each lane. Rows do not depend on each other, so
// that results do not depend on the instruction set. Internal linkage, as in float_lanes.hpp.
#pragma once

#include <cstddef>

#include "kernels/float_kernels.hpp"
#include "kernels/generic/float_lanes.hpp"

namespace entrollm {
namespace {

using LaneMask = decltype(NativeFloats{} < NativeFloats{});

inline NativeFloats splat_native(float value) { return NativeFloats{} + value; }

// The entries of a table at whole numbers. `at_zero` points to the entry of 0.
inline NativeFloats look_up(const float* at_zero, NativeFloats k) {
#if defined(__AVX512F__)
  return _mm512_i32gather_ps(_mm512_cvtps_epi32(k), at_zero, 4);
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(at_zero, _mm256_cvtps_epi32(k), 4);
#else
  NativeFloats found;
  for (std::size_t i = 0; i < kNative; ++i) found[i] = at_zero[static_cast<int>(k[i])];
  return found;
#endif
}

// Ways on from a state: by the parity of the integer, the best integer and the cost of the path.
struct Branches {
  NativeFloats integer[2];
  NativeFloats cost[2];
};

inline Branches branches_of(NativeFloats x, NativeFloats cost, float weight, const float* prices) {
  constexpr float kRounder = 12582912.0f;  // adding it rounds; the integer is in the lowest bits
  constexpr float kSmallest = 1.0f - kTrellisZero, kLargest = kTrellisZero - 2.0f;
  // Both integers name an entry of `prices`. A comparison with NaN is false, so that it is clipped
  // too.
  const NativeFloats above = x > kSmallest ? x : splat_native(kSmallest);
  const NativeFloats clipped = above < kLargest ? above : splat_native(kLargest);
  const NativeFloats shifted = clipped + kRounder;
  const NativeFloats nearest = shifted - kRounder;
  const NativeFloats other = nearest + (x > nearest ? splat_native(1.0f) : splat_native(-1.0f));
  const auto costs = [&](NativeFloats integer) {
    const NativeFloats error = x - integer;
    return cost + (error * error + look_up(prices + kTrellisZero, integer)) * weight;
  };
  const NativeFloats nearest_cost = costs(nearest), other_cost = costs(other);
  const LaneMask is_odd = (LaneMask)((NativeWords)shifted << 31) < 0;
  return {{is_odd ? other : nearest, is_odd ? nearest : other},
          {is_odd ? other_cost : nearest_cost, is_odd ? nearest_cost : other_cost}};
}

// What is kept of each step for the way back: the number, plus kSecond if the path to a state came
// from the second of its two predecessors.
constexpr float kSecond = 1024.0f;

// A state is 2 m[j] + m[j + 1] before column j is rounded. The parity p leads to 2 m[j - 1] + m[j],
// where m[j - 1] = p xor m[j + 1].
inline void round_trellis_lanes(const TrellisBlock& block, std::size_t row, std::size_t rows) {
  NativeFloats targets[kMostTrellisColumns][4], chosen[kMostTrellisColumns][4], cost[4];
  const auto load = [&](const float* p) {
    NativeFloats v = {};
    std::memcpy(&v, p + row, rows * sizeof(float));
    return v;
  };
  for (std::size_t j = 0; j < block.columns; ++j) {
    const NativeFloats x = load(block.left + j * block.rows);
    for (auto& target : targets[j]) target = x;
  }
  for (std::size_t state = 0; state < 4; ++state) {
    cost[state] = load(block.start + state * block.rows);
  }
  for (std::size_t j = block.columns; j-- > 0;) {
    if (j == 0 && block.has_origin) {
      for (std::size_t state = 1; state < 4; ++state) cost[state] = splat_native(kClosedState);
    }
    Branches branches[4];
    for (std::size_t state = 0; state < 4; ++state) {
      const NativeFloats x = targets[j][state] - (state < 2 ? 0.0f : 0.5f);
      branches[state] = branches_of(x, cost[state], block.weights[j], block.prices);
    }
    NativeFloats value[4];
    LaneMask is_second[4];
    for (std::size_t state = 0; state < 4; ++state) {
      const std::size_t parity = state / 2, grid = state % 2;
      const Branches &first = branches[2 * grid], &second = branches[2 * grid + 1];
      is_second[state] = second.cost[1 - parity] < first.cost[parity];
      cost[state] = is_second[state] ? second.cost[1 - parity] : first.cost[parity];
      value[state] = (is_second[state] ? second.integer[1 - parity] : first.integer[parity]) +
                     (grid == 0 ? 0.0f : 0.5f);
      chosen[j][state] = value[state] + (is_second[state] ? splat_native(kSecond) : NativeFloats{});
    }
    if (block.reach == nullptr) continue;
    const float* reach = block.reach + j * block.columns;
    for (std::size_t i = 0; i < j; ++i) {
      NativeFloats* target = targets[i];
      const NativeFloats old[4] = {target[0], target[1], target[2], target[3]};
      for (std::size_t state = 0; state < 4; ++state) {
        const std::size_t grid = state % 2;
        target[state] =
            (is_second[state] ? old[2 * grid + 1] : old[2 * grid]) - value[state] * reach[i];
      }
    }
  }
  for (std::size_t lane = 0; lane < rows; ++lane) {
    std::size_t state = 0;
    for (std::size_t other = 1; other < 4; ++other) {
      if (cost[other][lane] < cost[state][lane]) state = other;
    }
    for (std::size_t j = 0; j < block.columns; ++j) {
      const float found = chosen[j][state][lane];
      const bool is_second = found > kSecond / 2;
      block.out[j * block.rows + row + lane] = is_second ? found - kSecond : found;
      state = 2 * (state % 2) + (is_second ? 1 : 0);
    }
  }
}

void round_trellis(const TrellisBlock& block) {
  for (std::size_t row = 0; row < block.rows; row += kNative) {
    const std::size_t left = block.rows - row;
    round_trellis_lanes(block, row, left < kNative ? left : kNative);
  }
}

}  // namespace
}  // namespace entrollm
