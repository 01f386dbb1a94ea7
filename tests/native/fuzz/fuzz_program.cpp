// libFuzzer: any bytes as the program of a code tree, and a block decoded with what is accepted.
#include "../hostile_block.hpp"

using namespace entrollm;
using namespace entrollm::test;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<const Kernels*> kernels = all_kernels();
  if (size == 0) return 0;
  try {
    const Code code({data + 1, size - 1}, data[0] % (kMaxLowBits + 1));
    const std::size_t count = kVector;
    Bytes out;
    decode_everywhere(kernels, code, Bytes(code.dense_size(count), 0xff), Bytes(64, 0xff), count,
                      out);
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
