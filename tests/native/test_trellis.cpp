// Matrices with a trellis: all forms have the half steps that the definition gives, and the
// products and rows of an ordinary matrix that has these as its symbols.
#include "codec/trellis.hpp"
#include "same_products.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// m[0] = m[1] = 0 and m[j + 1] = (k[j] mod 2) ^ m[j - 1].
Bytes half_steps_of(const Bytes& symbols, std::size_t columns) {
  Bytes steps(symbols.size());
  for (std::size_t row = 0; row < symbols.size() / columns; ++row) {
    std::vector<unsigned> m(columns + 1);
    for (std::size_t j = 0; j < columns; ++j) {
      const unsigned symbol = symbols[row * columns + j];
      if (j > 0) m[j + 1] = symbol % 2 ^ m[j - 1];
      steps[row * columns + j] = static_cast<std::uint8_t>(2 * symbol + m[j]);
    }
  }
  return steps;
}

void check_half_steps() {
  Random random(1);
  for (int n = 0; n < 200; ++n) {
    const std::size_t columns = kVector * (1 + random.below(20));
    Bytes symbols(columns);
    for (auto& symbol : symbols) symbol = random.byte();
    const Bytes expected = half_steps_of(symbols, columns);
    ExactBuffer found(symbols, 0);
    TrellisState state;
    for (std::size_t at = 0; at < columns;) {
      const std::size_t count = kVector * (1 + random.below((columns - at) / kVector));
      make_half_steps(found.data() + at, count, state);
      at += count;
    }
    require(std::memcmp(found.data(), expected.data(), columns) == 0,
            "half steps of a row in several pieces");
  }
}

// Returns whether the matrix has rows of several blocks.
bool check_forms(const CodedCase& c, ThreadPool& pool, Random& random) {
  const std::vector<float> column_scale(random.coin() ? c.geometry.columns : 0, 1.5f);
  const Scales scales{c.scale, c.offset, column_scale};
  const ExactBuffer dense = pad(c.rows.dense), sparse = pad(c.rows.sparse);
  const CodedMatrix coded(c.code, c.geometry, dense.span(), sparse.span(), c.rows.sparse_sizes,
                          scales, true);
  const Bytes steps = half_steps_of(c.symbols, c.geometry.columns);
  const Code bytes(Bytes{1, 8, 0}, 0);
  const EncodedRows plain_rows = encode_rows(bytes, c.geometry, steps.data());
  const ExactBuffer plain_dense = pad(plain_rows.dense), plain_sparse = pad({});
  const CodedMatrix plain(bytes, c.geometry, plain_dense.span(), plain_sparse.span(), {}, scales);
  check_equal(plain, coded, pool, random);
  const FlatMatrix flat(pool, coded);
  check_equal(plain, flat, pool, random);
  const Stored stored{c.geometry.rows, c.geometry.columns, 3,
                      encode_flat(c.symbols.data(), c.geometry.rows, c.geometry.columns, 3, {})};
  const FlatMatrix in_place(stored.rows, stored.columns, stored.streams(), scales, true);
  check_equal(plain, in_place, pool, random);
  const FlatMatrix copy(pool, in_place);
  require(in_place.has_trellis() && !copy.has_trellis(), "a copy has half steps as its symbols");
  check_equal(plain, copy, pool, random);
  return c.geometry.parts() > 1;
}

}  // namespace

int main() {
  check_half_steps();
  ThreadPool one(1), three(3);
  std::size_t parts = 0;
  for (std::uint64_t seed = 0; seed < 24; ++seed) {
    Random random(seed);
    const RandomCode source(random);
    const CodedCase c(random, source);
    parts += check_forms(c, random.coin() ? one : three, random);
  }
  require(parts > 4 && parts < 20, "rows of one and of several blocks");
}
