// libFuzzer: a block of one of many codes from arbitrary bytes; all kernels must agree about it.
#include "../hostile_block.hpp"

using namespace entrollm;
using namespace entrollm::test;

// Input: code seed (2 bytes), vectors (1), then the sparse part's length (2) and both parts.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<const Kernels*> kernels = all_kernels();
  if (size < 5) return 0;
  Random random(data[0] | static_cast<std::size_t>(data[1]) << 8);
  const Code code = RandomCode(random).code();
  const std::size_t count = kVector * (1 + data[2] % 16);
  const std::size_t sparse_size =
      std::min<std::size_t>(size - 5, data[3] | static_cast<std::size_t>(data[4]) << 8);
  const std::span<const std::uint8_t> sparse(data + 5, sparse_size);
  Bytes dense(data + 5 + sparse_size, data + size);
  dense.resize(code.dense_size(count));
  Bytes out;
  decode_everywhere(kernels, code, dense, sparse, count, out);
  return 0;
}
