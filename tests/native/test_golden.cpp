// Stored bytes of fixed blocks: the encoder must make the same bytes, and every set of kernels must
// read them, on every architecture. A changed digest is a changed format.
#include <cinttypes>
#include <iterator>

#include "codec/encode.hpp"
#include "hostile_block.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// FNV-1a, 64 bits.
std::uint64_t digest(const Bytes& bytes, std::uint64_t hash = 0xcbf29ce484222325) {
  for (const std::uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3;
  return hash;
}

struct Golden {
  const char* name;
  Bytes program;
  int low_bits;
  const char* digest;  // of the dense bytes, then the sparse ones
};

const Golden kGolden[] = {
    {"one symbol", {0, 7}, 0, "cbf29ce484222325"},
    {"1-1-1-2", {1, 1, 1, 8, 1, 1, 1, 7, 1, 1, 1, 9, 1, 2, 0, 6, 10, 5, 11}, 0, "bb3a6ca2b7d97687"},
    {"2-1-2", {1, 2, 1, 8, 7, 9, 1, 1, 1, 10, 1, 2, 0, 6, 11, 5, 12}, 0, "a017bbae9e8422e7"},
    {"3-8", {1, 3, 1, 8, 7, 9, 6, 10, 5, 11, 1, 8, 0}, 0, "ff95851dab472607"},
    {"split", {2, 1, 1, 0, 8, 7, 1, 2, 1, 9, 6, 10, 1, 1, 0, 5, 11}, 0, "9587553233abbe88"},
    {"2 + 3 low bits", {1, 2, 0, 0, 8, 16, 24}, 3, "ee95d67bf15738fc"},
    {"3-2 + 1 low bit",
     {1, 3, 1, 8, 6, 10, 4, 12, 2, 14, 1, 2, 0, 0, 16, 18, 20},
     1,
     "b1e530a64893cb2b"},
};

// Symbols of a block of 37 vectors: the code's own, the first ones likelier.
Bytes symbols_of(const Golden& golden) {
  const Bytes candidates = golden.low_bits == 3   ? Bytes{0, 3, 8, 15, 17, 31}
                           : golden.low_bits == 1 ? Bytes{8, 9, 6, 10, 4, 13, 2, 15, 0, 17, 20, 21}
                           : golden.program[0] == 0 ? Bytes{7}
                                                    : Bytes{8, 7, 9, 6, 10, 5, 11};
  Random random(1);
  Bytes symbols(37 * kVector);
  for (auto& symbol : symbols) {
    const std::size_t i = random.below(candidates.size());
    symbol = candidates[std::min(i, random.below(candidates.size()))];
  }
  return symbols;
}

}  // namespace

int main() {
  const std::vector<const Kernels*> kernels = all_kernels();
  for (const Golden& golden : kGolden) {
    const Code code(golden.program, golden.low_bits);
    const Bytes symbols = symbols_of(golden);
    const EncodedRows rows =
        encode_rows(code, {1, symbols.size(), 1, symbols.size()}, symbols.data());
    Bytes out;
    require(decode_everywhere(kernels, code, rows.dense, rows.sparse, symbols.size(), out) ==
                    BlockStatus::kOk &&
                out == symbols,
            std::string(golden.name) + " decodes to what was encoded");
    char hash[17];
    std::snprintf(hash, sizeof hash, "%016" PRIx64, digest(rows.sparse, digest(rows.dense)));
    require(hash == std::string(golden.digest),
            std::string(golden.name) + " is stored as ever, not as " + hash);
  }
  std::printf("golden: %zu codes are stored as ever\n", std::size(kGolden));
}
