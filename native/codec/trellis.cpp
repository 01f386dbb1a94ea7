#include "codec/trellis.hpp"

#include <bit>
#include <cstring>

#include "format/layout.hpp"

namespace entrollm {
namespace {

constexpr std::uint64_t kLowestBits = 0x0101010101010101;

static_assert(std::endian::native == std::endian::little && kVector == 64);

// The parities of 64 symbols, that of the first one in bit 0.
std::uint64_t parities_of(const std::uint8_t* symbols) {
  std::uint64_t parities = 0;
  for (int group = 0; group < 8; ++group) {
    std::uint64_t word;
    std::memcpy(&word, symbols + 8 * group, sizeof word);
    // Moves bit 8 i to bit 56 + i; no two terms of the product meet.
    parities |= ((word & kLowestBits) * 0x0102040810204080 >> 56) << 8 * group;
  }
  return parities;
}

// Bit i of a byte, in the lowest bit of byte i.
std::uint64_t spread(std::uint64_t byte) {
  const std::uint64_t picked = byte * kLowestBits & 0x8040201008040201;
  return (picked + 0x7f7f7f7f7f7f7f7f) >> 7 & kLowestBits;
}

}  // namespace

void make_half_steps(std::uint8_t* symbols, std::size_t count, TrellisState& state) {
  for (std::size_t at = 0; at < count; at += kVector) {
    // next[j] = m[j + 1]: the exclusive or of the parities of columns j, j - 2, j - 4 and so on.
    std::uint64_t next = parities_of(symbols + at);
    if (!state.has_begun) next &= ~std::uint64_t{1};  // m[1] is 0, whatever column 0 has
    state.has_begun = true;
    next ^= state.grids;
    for (int way = 2; way < 64; way *= 2) next ^= next << way;
    const std::uint64_t here = next << 1 | state.grids >> 1;
    state.grids = next >> 62;
    for (int group = 0; group < 8; ++group) {
      std::uint64_t word;
      std::uint8_t* place = symbols + at + 8 * group;
      std::memcpy(&word, place, sizeof word);
      word = (word & ~(kLowestBits << 7)) << 1 | spread(here >> 8 * group & 0xff);
      std::memcpy(place, &word, sizeof word);
    }
  }
}

}  // namespace entrollm
