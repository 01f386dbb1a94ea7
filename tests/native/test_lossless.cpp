// Lossless words: every instruction set divides, joins and multiplies as the scalar kernels do, bit
// for bit, within its buffers; sizes that do not fit are refused.
#include <bit>
#include <cmath>

#include "coded_case.hpp"
#include "guarded.hpp"
#include "product/lossless.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

void check_words(const Kernels& kernels, Random& random) {
  const std::string name = kernels.name;
  for (std::size_t count = 0; count < 200; ++count) {
    Guarded words(2 * count, true), high(count, random.coin()), low(count, random.coin());
    for (std::size_t i = 0; i < words.size(); ++i) words.data()[i] = random.byte();
    const auto* source = reinterpret_cast<const std::uint16_t*>(words.data());
    kernels.lossless->split(source, count, high.data(), low.data());
    for (std::size_t i = 0; i < count; ++i) {
      require((high.data()[i] << 8 | low.data()[i]) == std::rotl(source[i], 1), name + " splits");
    }
    Guarded joined(2 * count, true);
    kernels.lossless->join(high.data(), low.data(), count,
                           reinterpret_cast<std::uint16_t*>(joined.data()));
    require(count == 0 || std::memcmp(joined.data(), words.data(), words.size()) == 0,
            name + " joins");
  }
}

void check_sums(const Kernels& kernels, Random& random) {
  const std::string name = kernels.name;
  for (std::size_t vectors = 1; vectors < 20; ++vectors) {
    const std::size_t chunks = 1 + random.below(5), size = chunks * kVector;
    Guarded high(size, random.coin()), low(size, random.coin());
    Guarded floats(vectors * size * sizeof(float), true);
    auto* x = reinterpret_cast<float*>(floats.data());
    for (std::size_t i = 0; i < size; ++i) {
      // Exponents near 1 in either format, both signs and any mantissa.
      high.data()[i] = static_cast<std::uint8_t>(120 + random.below(8));
      low.data()[i] = random.byte();
    }
    for (std::size_t i = 0; i < vectors * size; ++i) {
      x[i] = static_cast<float>(random.byte()) - 100.0f;
    }
    for (const bool half : {false, true}) {
      const std::size_t lanes = vectors * kLosslessLanes;
      Guarded found(lanes * sizeof(float), true), expected(lanes * sizeof(float), true);
      for (Guarded* buffer : {&found, &expected}) {
        auto* sums = reinterpret_cast<float*>(buffer->data());
        for (std::size_t i = 0; i < lanes; ++i) sums[i] = static_cast<float>(i);
        const LosslessRow row{high.data(), low.data(), chunks, x, size, vectors, sums};
        const LosslessKernels& table =
            buffer == &expected ? kScalarLosslessKernels : *kernels.lossless;
        (half ? table.add_half : table.add_bfloat16)(row);
      }
      require(std::memcmp(found.data(), expected.data(), found.size()) == 0,
              name + " adds in the stated order");
    }
  }
}

// Rows and vectors of every remainder of what registers hold.
void check_panels(const Kernels& kernels, Random& random) {
  const std::string name = kernels.name;
  for (std::size_t rows = 1; rows < 8; ++rows) {
    const std::size_t vectors = 1 + random.below(11), chunks = 1 + random.below(3);
    const std::size_t size = chunks * kVector;
    Guarded bytes(2 * rows * size, random.coin()), floats(vectors * size * sizeof(float), true);
    for (std::size_t i = 0; i < rows * size; ++i) {
      bytes.data()[i] = static_cast<std::uint8_t>(120 + random.below(8));
      bytes.data()[rows * size + i] = random.byte();
    }
    auto* x = reinterpret_cast<float*>(floats.data());
    for (std::size_t i = 0; i < vectors * size; ++i) x[i] = static_cast<float>(random.byte());
    for (const bool half : {false, true}) {
      Guarded panel(rows * size * sizeof(float), true);
      Guarded found(rows * vectors * kLosslessLanes * sizeof(float), true);
      std::memset(found.data(), 0, found.size());
      auto* weights = reinterpret_cast<float*>(panel.data());
      auto* lanes = reinterpret_cast<float*>(found.data());
      const LosslessKernels& table = *kernels.lossless;
      std::vector<float> expected(rows * vectors * kLosslessLanes);
      for (std::size_t row = 0; row < rows; ++row) {
        const std::uint8_t* high = bytes.data() + row * size;
        const std::uint8_t* low = high + rows * size;
        (half ? table.expand_half : table.expand_bfloat16)(high, low, chunks, weights + row * size);
        const LosslessRow one{
            high, low, chunks, x, size, vectors, expected.data() + row * vectors * kLosslessLanes};
        (half ? kScalarLosslessKernels.add_half : kScalarLosslessKernels.add_bfloat16)(one);
      }
      table.add_panel({weights, size, rows, x, size, vectors, chunks, lanes});
      require(std::memcmp(lanes, expected.data(), found.size()) == 0,
              name + " adds panels in the stated order");
    }
  }
}

void check_columns() {
  for (const WordFormat format : {WordFormat::kBfloat16, WordFormat::kHalf}) {
    std::vector<int> seen(kVector);
    for (std::size_t i = 0; i < kVector; ++i) {
      ++seen[lossless_column(format, i / kLosslessRun, i % kLosslessRun)];
    }
    for (const int times : seen) require(times == 1, "every column of a chunk has one place");
  }
}

void check_refused_sizes(Random& random) {
  const Bytes program{1, 8, 0};
  const Geometry geometry{3, 70, 3, 128};
  const Code code(program, 0);
  const Bytes symbols(3 * 70, 1);
  EncodedRows rows = encode_rows(code, geometry, symbols.data());
  ExactBuffer dense = pad(rows.dense), sparse = pad({});
  const std::vector<float> one{1.0f};
  const CodedMatrix coded(code, geometry, dense.span(), sparse.span(), {}, {one, {}, {}});
  for (const FloatType type : {FloatType::kBfloat16, FloatType::kHalf, FloatType::kE4M3}) {
    for (std::size_t size = 0; size < 400; size += 1 + random.below(3)) {
      const Bytes low(size);
      const bool fits = size == (has_low_bytes(type) ? stored_bytes(3 * 70) : 0);
      bool is_refused = false;
      try {
        LosslessMatrix matrix(&coded, low, type);
      } catch (const std::invalid_argument&) {
        is_refused = true;
      }
      require(is_refused != fits, "low bytes of another size are refused");
    }
  }
}

}  // namespace

int main() {
  Random random(20);
  check_columns();
  check_refused_sizes(random);
  for (const Kernels* kernels : all_kernels()) {
    check_words(*kernels, random);
    check_sums(*kernels, random);
    check_panels(*kernels, random);
  }
  return 0;
}
