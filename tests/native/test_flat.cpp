// The flat layout: every instruction set packs and unpacks as the definition says.
#include <algorithm>

#include "format/flat.hpp"
#include "guarded.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// Fields in the order of the layout's definition: byte and bit of each column.
void check_definition() {
  for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
    for (std::size_t column = 0; column < kVector; ++column) {
      for (int bit = 0; bit < bits; ++bit) {
        Bytes chunk(flat_chunk_bytes(bits));
        set_flat_field(chunk.data(), bits, column, static_cast<std::uint8_t>(1 << bit));
        std::size_t ones = 0;
        for (const std::uint8_t byte : chunk) {
          ones += static_cast<std::size_t>(__builtin_popcount(byte));
        }
        require(ones == 1, "a bit of a field is one bit of its chunk");
        for (std::size_t other = 0; other < kVector; ++other) {
          require(flat_field(chunk.data(), bits, other) == (other == column ? 1 << bit : 0),
                  "it belongs to one column");
        }
      }
    }
  }
  Bytes chunk(flat_chunk_bytes(7));
  set_flat_field(chunk.data(), 7, 33, 0x5a);  // 0b101'1010: nibble 10, pair 1, bit 1
  require(chunk[1] == 0xa0 && chunk[32 + 1] == 1 << 4 && chunk[48 + 1] == 1 << 4,
          "the parts of width 7 lie where the format says");
}

void check_packing(const Kernels& kernels, Random& random) {
  const std::string name = kernels.name;
  for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
    for (std::size_t chunks = 0; chunks < 6; ++chunks) {
      const auto base = static_cast<std::uint8_t>(random.below(257 - (std::size_t{1} << bits)));
      Guarded symbols(chunks * kVector, random.coin());
      for (std::size_t i = 0; i < symbols.size(); ++i) symbols.data()[i] = random.byte();
      Guarded fields(flat_row_bytes(chunks, bits), random.coin());
      Bytes expected(fields.size()), clipped(symbols.size());
      kScalarFlatKernels.pack(symbols.data(), chunks, bits, base, expected.data());
      kernels.flat->pack(symbols.data(), chunks, bits, base, fields.data());
      require(std::memcmp(fields.data(), expected.data(), fields.size()) == 0, name + " packs");
      kScalarFlatKernels.unpack(expected.data(), chunks, bits, base, clipped.data());
      const int largest = base + (1 << bits) - 1;
      for (std::size_t i = 0; i < clipped.size(); ++i) {
        require(clipped[i] == std::clamp<int>(symbols.data()[i], base, largest), "symbols clip");
      }
      Guarded unpacked(symbols.size(), random.coin());
      kernels.flat->unpack(fields.data(), chunks, bits, base, unpacked.data());
      require(std::memcmp(unpacked.data(), clipped.data(), clipped.size()) == 0, name + " unpacks");
    }
  }
}

}  // namespace

int main() {
  check_definition();
  Random random(1);
  for (const Kernels* kernels : all_kernels()) {
    for (int n = 0; n < 20; ++n) check_packing(*kernels, random);
  }
  std::printf("flat: packed and unpacked by %zu instruction sets\n", all_kernels().size());
}
