// Programs of code trees: valid ones are read as they were written, all others are refused.
#include "hostile_block.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

const std::vector<const Kernels*> kKernels = all_kernels();

bool accepts(const Bytes& program, int low_bits) {
  const ExactBuffer exact(program, 0);
  try {
    const Code code(exact.span(), low_bits);
    require(code.nodes().size() <= kMaxNodes, "the number of nodes is bounded");
    for (const Node& node : code.nodes()) {
      require(node.bits >= 0 && (node.bits <= 6 || node.bits == 8), "widths are possible");
      const auto size = static_cast<int>(code.nodes().size());
      require(node.left < size && node.right < size, "children exist");
    }
    // Whatever the parser accepts must decode safely.
    const std::size_t count = 3 * kVector;
    Bytes out;
    decode_everywhere(kKernels, code, Bytes(code.dense_size(count), 0xff), Bytes(200, 0xff), count,
                      out);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

Bytes nested(std::size_t depth) {
  Bytes program;
  for (std::size_t i = 0; i < depth; ++i) program.insert(program.end(), {1, 1, 1, 7});
  program.insert(program.end(), {1, 1, 0, 7, 8});
  return program;
}

// Splits of depth `depth` over fields: 2^(depth + 1) - 1 nodes.
void append_full(std::size_t depth, Bytes& program) {
  if (depth == 0) {
    program.insert(program.end(), {1, 1, 0, 7, 8});
    return;
  }
  program.push_back(2);
  append_full(depth - 1, program);
  append_full(depth - 1, program);
}

void check_limits() {
  require(accepts(nested(kMaxDepth), 0), "the deepest tree is read");
  require(!accepts(nested(kMaxDepth + 1), 0), "a deeper one is not");
  require(!accepts(Bytes(1 << 20, 2), 0), "nor an endless one");
  Bytes full;
  append_full(8, full);
  require(accepts(full, 0), "511 nodes are read");
  Bytes larger{1, 1, 1, 7};
  larger.insert(larger.end(), full.begin(), full.end());
  require(!accepts(larger, 0), "512 are not");
  for (int low_bits : {-1, kMaxLowBits + 1, 1 << 30}) {
    require(!accepts({0, 0}, low_bits), "low bits have a range");
  }
}

}  // namespace

int main() {
  check_limits();
  std::size_t accepted = 0;
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    Random random(seed);
    const RandomCode source(random);
    require(accepts(source.program, source.low_bits), "a valid program is read");
    Bytes program = source.program;
    require(!accepts(Bytes(program.begin(), program.end() - 1), 0),
            "a program cut short is refused");
    program.push_back(random.byte());
    require(!accepts(program, 0), "a program with a byte more is refused");
    program.pop_back();
    for (int n = 0; n < 4; ++n) {
      Bytes changed = program;
      changed[random.below(changed.size())] = static_cast<std::uint8_t>(random.below(10));
      accepted += accepts(changed, source.low_bits);
    }
    Bytes noise(random.below(64));
    for (auto& byte : noise) byte = static_cast<std::uint8_t>(random.below(4));
    accepted += accepts(noise, 0);
  }
  std::printf("code: %zu of 15000 changed programs still are trees\n", accepted);
}
