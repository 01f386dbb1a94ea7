// Blocks of random codes: what was encoded comes back; damaged and invented streams are survived.
#include "codec/encode.hpp"
#include "hostile_block.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

const std::vector<const Kernels*> kKernels = all_kernels();

struct Block {
  Bytes dense;
  Bytes sparse;
  std::size_t count;
};

Block encode_one(const Code& code, const Bytes& symbols) {
  const Geometry geometry{1, symbols.size(), 1, symbols.size()};
  geometry.validate();
  EncodedRows rows = encode_rows(code, geometry, symbols.data());
  require(rows.sparse_sizes.size() == 1 && rows.sparse_sizes[0] == rows.sparse.size(),
          "one block with its size");
  require(rows.dense.size() == code.dense_size(symbols.size()), "the dense size is as computed");
  return {rows.dense, rows.sparse, symbols.size()};
}

Bytes random_symbols(Random& random, const RandomCode& source) {
  Bytes symbols(kVector * (1 + random.below(random.coin() ? 4 : kMaxBlockColumns / kVector)));
  const std::size_t skew = random.below(20);
  for (auto& symbol : symbols) symbol = source.symbol(random, skew);
  return symbols;
}

void damage(Random& random, Bytes& bytes) {
  if (bytes.empty()) return;
  for (std::size_t n = 1 + random.below(3); n > 0; --n) {
    // The list length at the front decides most.
    const std::size_t at = random.coin() ? random.below(std::min<std::size_t>(4, bytes.size()))
                                         : random.below(bytes.size());
    bytes[at] = random.coin() ? static_cast<std::uint8_t>(bytes[at] ^ (1 << random.below(8)))
                              : random.byte();
  }
}

// Returns whether the damage was noticed.
bool survive_damage(Random& random, const Code& code, Block block) {
  const std::size_t how = random.below(5);
  if (how == 0) {
    damage(random, block.dense);
  } else if (how == 1) {
    damage(random, block.sparse);
  } else if (how == 2) {
    block.sparse.resize(random.below(block.sparse.size() + 1));
  } else if (how == 3) {
    block.sparse.resize(block.sparse.size() + 1 + random.below(70), random.byte());
  } else {
    const std::uint8_t fill = random.coin() ? 0xff : random.coin() ? 0 : random.byte();
    for (auto& byte : block.dense) byte = fill;
    if (random.coin()) {
      for (auto& byte : block.sparse) byte = random.coin() ? fill : random.byte();
    }
  }
  Bytes out;
  return decode_everywhere(kKernels, code, block.dense, block.sparse, block.count, out) ==
         BlockStatus::kCorrupt;
}

void invent(Random& random, const Code& code) {
  const std::size_t count = kVector * (1 + random.below(kMaxBlock / kVector));
  Bytes dense(code.dense_size(count));
  Bytes sparse(random.below(3 * count));
  for (auto& byte : dense) byte = random.byte();
  for (auto& byte : sparse) byte = random.byte();
  Bytes out;
  decode_everywhere(kKernels, code, dense, sparse, count, out);
}

}  // namespace

int main() {
  std::size_t noticed = 0;
  for (std::uint64_t seed = 0; seed < 1500; ++seed) {
    Random random(seed);
    const RandomCode source(random);
    const Code code = source.code();
    const Bytes symbols = random_symbols(random, source);
    const Block block = encode_one(code, symbols);
    Bytes out;
    require(decode_everywhere(kKernels, code, block.dense, block.sparse, block.count, out) ==
                    BlockStatus::kOk &&
                out == symbols,
            "seed " + std::to_string(seed) + " decodes to what was encoded");
    for (int n = 0; n < 4; ++n) noticed += survive_damage(random, code, block);
    invent(random, code);
  }
  std::printf("decode: %zu of 6000 damaged blocks refused, the others decoded alike\n", noticed);
  require(noticed > 1000, "damage is noticed where lengths disagree");
}
