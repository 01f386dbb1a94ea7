// The trellis of two grids along a row; docs/reference/format.md defines it. The symbols k of a row
// become n = 2 k + m, modulo 256, with m[0] = m[1] = 0 and m[j + 1] = (k[j] mod 2) ^ m[j - 1].
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {

// What the columns of a row so far leave to those that follow.
struct TrellisState {
  std::uint64_t grids = 0;  // m of the last column in bit 0, and of the next one in bit 1
  bool has_begun = false;
};

// Turns the next `count` symbols of a row, a multiple of kVector, into half steps in place.
void make_half_steps(std::uint8_t* symbols, std::size_t count, TrellisState& state);

}  // namespace entrollm
