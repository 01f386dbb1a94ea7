// Multiplies flat rows with one vector, patches included, or plain bytes, for a tracer to count
// instructions.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "format/flat.hpp"
#include "product/activations.hpp"

using namespace entrollm;

// Arguments: bits of a field, 8 for plain bytes, rows, columns (at most 4096), patches of a
// thousand weights.
int main(int argc, char** argv) {
  if (argc != 5) throw std::invalid_argument("count_flat BITS ROWS COLUMNS PATCHES_PER_THOUSAND");
  const int bits = std::atoi(argv[1]);
  const auto rows = std::stoul(argv[2]), columns = std::stoul(argv[3]), often = std::stoul(argv[4]);
  const std::size_t chunks = columns / kVector;
  std::mt19937 random(1);
  AlignedArray<std::uint8_t> fields(rows * flat_row_bytes(chunks, bits));
  for (std::size_t i = 0; i < fields.size(); ++i) {
    fields.data()[i] = static_cast<std::uint8_t>(random());
  }
  std::vector<std::uint32_t> first{0};
  std::vector<FlatPatch> patches;
  for (std::size_t row = 0; row < rows; ++row) {
    std::size_t before = 0;
    for (std::size_t column = 0; column < columns; ++column) {
      if (random() % 1000 >= often) continue;
      patches.push_back(make_patch(column - before, static_cast<int>(random() % 15) - 7));
      before = column;
    }
    first.push_back(static_cast<std::uint32_t>(patches.size()));
  }
  const std::vector<float> values(columns, 1.0f);
  ThreadPool pool(1);
  std::vector<std::int64_t> sums(rows);
  const Kernels& kernels = select_kernels(std::getenv("ENTROLLM_ISA"));
  if (bits == 8) {
    const Activations x(pool, {values.data(), 1, columns, columns, {}}, Activations::Layout::kRows);
    for (std::size_t row = 0; row < rows; ++row) {
      sums[row] = kernels.dot(fields.data() + row * columns, x.digits(0, 0), columns);
    }
  } else {
    const Activations x(pool, {values.data(), 1, columns, columns, {}},
                        Activations::Layout::kSideBySide);
    kernels.flat->product({fields.data(), rows, chunks, bits}, x.group(0), sums.data(), 1);
    kernels.flat->add_patches({first.data(), patches.data()}, rows, x.interleaved_whole(), 1,
                              sums.data());
  }
  std::printf("%lld\n", static_cast<long long>(sums[0]));
}
