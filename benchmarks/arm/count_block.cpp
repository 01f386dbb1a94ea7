// Decodes one stored block and multiplies its rows, for a tracer to count instructions.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "codec/decode.hpp"
#include "product/activations.hpp"

using namespace entrollm;

namespace {

std::vector<std::uint8_t> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

// Arguments: a folder with `program`, `dense` and `sparse`, low bits, rows, columns, sparse bytes.
int main(int argc, char** argv) {
  if (argc != 6)
    throw std::invalid_argument("count_block FOLDER LOW_BITS ROWS COLUMNS SPARSE_BYTES");
  const std::string folder = argv[1];
  const Code code(read(folder + "/program"), std::atoi(argv[2]));
  const auto rows = std::stoul(argv[3]);
  const auto columns = std::stoul(argv[4]);
  const auto dense = read(folder + "/dense");
  const auto sparse = read(folder + "/sparse");
  const std::vector<float> values(columns, 1.0f);
  ThreadPool pool(1);
  const Activations x(pool, {values.data(), 1, columns, columns, {}}, Activations::Layout::kRows);
  const Kernels& kernels = select_kernels(std::getenv("ENTROLLM_ISA"));
  DecodeScratch& scratch = thread_scratch(code, rows * columns);
  if (decode_block(kernels, code, dense.data(), {sparse.data(), std::stoul(argv[5])},
                   rows * columns, scratch) != BlockStatus::kOk) {
    throw std::runtime_error("the block does not decode");
  }
  std::int64_t sum = 0;
  for (std::size_t row = 0; row < rows; ++row) {
    sum += kernels.dot(scratch.block() + row * columns, x.digits(0, 0), columns);
  }
  std::printf("%lld\n", static_cast<long long>(sum));
}
