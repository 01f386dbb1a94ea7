#include "codec/histogram.hpp"

#include <algorithm>
#include <cstring>

namespace entrollm {
namespace {

// Tables of 32-bit counts hold this many symbols.
constexpr std::size_t kMostSymbols = std::size_t{1} << 31;

}  // namespace

void add_to_histogram(const std::uint8_t* symbols, std::size_t size, std::uint64_t (&counts)[256]) {
  while (size != 0) {
    // With eight tables, runs of one symbol do not wait for their own increments.
    std::uint32_t tables[8][256] = {};
    const std::size_t now = std::min(size, kMostSymbols);
    std::size_t i = 0;
    for (; i + 8 <= now; i += 8) {
      std::uint64_t eight;
      std::memcpy(&eight, symbols + i, sizeof eight);
      for (int k = 0; k < 8; ++k) ++tables[k][eight >> 8 * k & 0xff];
    }
    for (; i < now; ++i) ++tables[0][symbols[i]];
    for (std::size_t symbol = 0; symbol < 256; ++symbol) {
      for (const auto& table : tables) counts[symbol] += table[symbol];
    }
    symbols += now;
    size -= now;
  }
}

}  // namespace entrollm
