// libFuzzer: a lossless matrix whose streams were changed or are arbitrary, and any low bytes.
// Coded and flat symbols must be refused alike or give the same words, values and products bit for
// bit, and the words must be those of the symbols.
#include <bit>

#include "input.hpp"
#include "product/lossless.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

constexpr FloatType kTypes[] = {FloatType::kBfloat16, FloatType::kHalf, FloatType::kE4M3,
                                FloatType::kE5M2};

// A cascade without low bits, which some instruction sets decode and multiply in one pass.
Bytes cascade(Random& random) {
  Bytes program;
  for (bool is_last = false; !is_last;) {
    is_last = random.coin() || program.size() > 60;
    const auto bits = static_cast<std::uint8_t>(1 + random.below(4));
    program.insert(program.end(), {1, bits, static_cast<std::uint8_t>(!is_last)});
    const std::size_t names = (std::size_t{1} << bits) - (is_last ? 0 : 1);
    for (std::size_t i = 0; i < names; ++i) program.push_back(random.byte());
  }
  return program;
}

RandomCode lossless_code(Random& random, bool is_cascade) {
  RandomCode source(random);
  if (!is_cascade) return source;
  source.program = cascade(random);
  source.low_bits = 0;
  source.symbols = {source.program[3], source.program.back()};
  return source;
}

// Columns as fused products take them.
Geometry wide_geometry(Input& input) {
  constexpr std::size_t kEight = 8 * kVector;
  const std::size_t rows = 1 + input.byte() % 12, strides = 1 + input.byte() % 3;
  Geometry geometry{rows, kEight * strides, 1, kEight * (1 + input.byte() % strides)};
  geometry.block_rows = 1 + input.byte() % (kMaxBlock / geometry.block_columns);
  geometry.validate();
  return geometry;
}

using Words = std::optional<Bytes>;

Words words_of(ThreadPool& pool, const LosslessMatrix& matrix, std::size_t begin, std::size_t end) {
  const std::size_t size = (end - begin) * matrix.geometry().columns * word_bytes(matrix.type());
  // Words of 16 bits need an aligned buffer.
  std::vector<std::uint16_t> buffer((size + 1) / 2);
  auto* bytes = reinterpret_cast<std::uint8_t*>(buffer.data());
  try {
    matrix.words(pool, begin, end, bytes);
  } catch (const CorruptBlock&) {
    return std::nullopt;
  }
  return Bytes(bytes, bytes + size);
}

void check_words(const LosslessMatrix& matrix, std::span<const std::uint8_t> symbols,
                 const Bytes& words) {
  const std::size_t columns = matrix.geometry().columns;
  for (std::size_t i = 0; i < symbols.size(); ++i) {
    if (has_low_bytes(matrix.type())) {
      const std::uint8_t low = matrix.low(i / columns)[i % columns];
      std::uint16_t word;
      std::memcpy(&word, words.data() + 2 * i, 2);
      require(std::rotl(word, 1) == (symbols[i] << 8 | low), "words have the bits of their bytes");
    } else {
      require(std::rotl(words[i], 1) == symbols[i], "words of 8 bits are rotated symbols");
    }
  }
}

void check(ThreadPool& pool, const LosslessMatrix& coded, const LosslessMatrix& flat,
           const std::vector<float>& x, std::size_t batch) {
  const Geometry& geometry = coded.geometry();
  const auto values = [&](const LosslessMatrix& matrix) {
    const std::vector<std::int64_t> rows{0, static_cast<std::int64_t>(geometry.rows) - 1, 0};
    return product(rows.size() * geometry.columns,
                   [&](float* out) { matrix.dequantize(pool, rows, out); });
  };
  const auto sums = [&](const LosslessMatrix& matrix) {
    const LosslessMatrix* each = &matrix;
    return product(batch * geometry.rows,
                   [&](float* y) { multiply_lossless(pool, {&each, 1}, x.data(), batch, y); });
  };
  require_equal(values(coded), values(flat), "the values of flat symbols");
  require_equal(sums(coded), sums(flat), "the product of flat symbols");
  const std::size_t middle = geometry.rows / 2;
  require(
      words_of(pool, coded, middle, geometry.rows) == words_of(pool, flat, middle, geometry.rows),
      "the words of flat symbols");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static ThreadPool pool(1);
  Input input(data, size);
  Random random(input.word());
  const bool is_cascade = input.byte() % 2 != 0;
  const RandomCode source = lossless_code(random, is_cascade);
  const Code code = source.code();
  const Geometry geometry = is_cascade ? wide_geometry(input) : small_geometry(input);
  const FloatType type = kTypes[input.byte() % std::size(kTypes)];
  const std::size_t batch = 1 + input.byte() % 12;
  const EncodedRows rows = streams(input, source, code, geometry, random);

  const ExactBuffer dense = pad(rows.dense);
  const ExactBuffer sparse = pad(rows.sparse);
  const std::vector<float> one{1.0f};
  const CodedMatrix symbols(code, geometry, dense.span(), sparse.span(), rows.sparse_sizes,
                            {one, {}, {}});
  Bytes low_bytes(has_low_bytes(type) ? geometry.rows * geometry.columns : 0);
  for (auto& byte : low_bytes) byte = random.byte();
  const ExactBuffer low = low_bytes.empty() ? ExactBuffer({}, 0) : pad(low_bytes);
  std::vector<float> x(batch * geometry.columns);
  for (auto& value : x) value = static_cast<float>(random.byte()) - 100.0f;

  const LosslessMatrix coded(&symbols, low.span(), type);
  const Words words = words_of(pool, coded, 0, geometry.rows);
  std::optional<FlatMatrix> flat_symbols;
  try {
    flat_symbols.emplace(pool, symbols);
  } catch (const CorruptBlock&) {
  }
  require(words.has_value() == flat_symbols.has_value(),
          "words and flat symbols are refused alike");
  if (!words) {
    product(batch * geometry.rows, [&](float* y) {
      const LosslessMatrix* each = &coded;
      multiply_lossless(pool, {&each, 1}, x.data(), batch, y);
      require(false, "a product refuses symbols that do not decode");
    });
    return 0;
  }
  Bytes decoded(geometry.rows * geometry.columns);
  flat_symbols->decode(pool, 0, geometry.rows, decoded.data());
  check_words(coded, decoded, *words);
  check(pool, coded, LosslessMatrix(&*flat_symbols, low.span(), type), x, batch);
  return 0;
}
