// Flat matrices have the integers, products and rows of the coded matrices that they are made from.
#include <array>
#include <cmath>

#include "product/flat_transcode.hpp"
#include "same_products.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// A matrix whose symbols crowd around `center`, with some anywhere.
struct Crowded {
  Geometry geometry;
  Code code{Bytes{1, 8, 0}, 0};
  EncodedRows rows;
  std::vector<float> scale, offset, column_scale;
  ExactBuffer dense, sparse;
  CodedMatrix matrix;

  Crowded(Random& random, const Geometry& shape, std::size_t spread, std::size_t strays)
      : geometry(shape),
        rows(encode(random, spread, strays)),
        scale(random.coin() ? 1 : geometry.rows, 0.5f),
        offset(random.coin() ? scale.size() : 0, -3.25f),
        column_scale(random.coin() ? geometry.columns : 0, 1.5f),
        dense(pad(rows.dense)),
        sparse(pad(rows.sparse)),
        matrix(code, geometry, dense.span(), sparse.span(), {}, {scale, offset, column_scale}) {
    for (auto& value : scale) value = static_cast<float>(1 + random.byte()) / 64;
  }

  EncodedRows encode(Random& random, std::size_t spread, std::size_t strays) const {
    Bytes symbols(geometry.rows * geometry.columns);
    const std::size_t least = random.below(257 - spread);
    for (auto& symbol : symbols) {
      symbol = random.below(1000) < strays
                   ? random.byte()
                   : static_cast<std::uint8_t>(least + random.below(spread));
    }
    return encode_rows(code, geometry, symbols.data());
  }
};

Geometry blocks_of(std::size_t rows, std::size_t columns) {
  Geometry geometry{rows, columns, 1, 0};
  geometry.block_columns = std::min(geometry.padded_columns(), kMaxBlockColumns);
  geometry.block_rows = std::max<std::size_t>(1, kMaxBlock / geometry.block_columns);
  geometry.validate();
  return geometry;
}

void check_widths(ThreadPool& pool) {
  Random random(2);
  std::array<std::size_t, kMaxFlatBits + 1> rows{};
  std::size_t patches = 0, without = 0;
  for (const std::size_t columns : {1, 63, 64, 65, 576, 4096, 4161}) {
    for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
      for (const std::size_t strays : {0, 6}) {
        const Crowded c(random, blocks_of(1 + random.below(150), columns), std::size_t{1} << bits,
                        strays);
        const FlatMatrix flat(pool, c.matrix);
        check_equal(c.matrix, flat, pool, random);
        for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += flat.rows_by_bits()[i];
        patches += flat.patches();
        without += flat.patches() == 0;
        require(flat.size_bytes() <= most_flat_bytes(c.geometry, flat.segment_rows()), "the bound");
      }
    }
  }
  for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
    require(rows[static_cast<std::size_t>(bits)] > 0, "every width occurs");
  }
  require(patches > 0 && without > 0, "with and without patches");
}

void check_wide(ThreadPool& pool) {
  Random random(3);
  const Crowded c(random, blocks_of(5, 70001), 16, 5);
  const FlatMatrix flat(pool, c.matrix);
  require(flat.patches() > 0, "rows wider than 16 bits can number have patches");
  check_equal(c.matrix, flat, pool, random);
}

// A window chosen by the counted chunks, with everything else outside.
void check_misleading(ThreadPool& pool) {
  const Geometry geometry = blocks_of(64, 4096);
  Bytes symbols(geometry.rows * geometry.columns);
  for (std::size_t i = 0; i < symbols.size(); ++i) {
    const std::size_t row = i / 4096, chunk = i % 4096 / kVector;
    symbols[i] = static_cast<std::uint8_t>(chunk % 4 == row % 4 ? 3 : 100 + i % 100);
  }
  const Code code(Bytes{1, 8, 0}, 0);
  const EncodedRows rows = encode_rows(code, geometry, symbols.data());
  const ExactBuffer dense = pad(rows.dense), sparse = pad(rows.sparse);
  const std::vector<float> scale{1.0f};
  const CodedMatrix matrix(code, geometry, dense.span(), sparse.span(), {}, {scale, {}, {}});
  const FlatMatrix flat(pool, matrix);
  require(flat.rows_by_bits()[8] == 64 && flat.patches() == 0, "bytes where patches take more");
  Random random(4);
  check_equal(matrix, flat, pool, random);
}

void check_choice() {
  std::uint64_t counts[256] = {};
  for (std::size_t i = 0; i < 16; ++i) counts[100 + i] = 1000;
  const FlatWindow exact = choose_flat_window(counts, FlatGoal::kSpeed);
  require(exact.bits == 4 && exact.base == 100, "the window that has everything");
  counts[7] = 3;
  require(choose_flat_window(counts, FlatGoal::kSpeed).bits == 4,
          "a few patches are cheaper than a bit");
  counts[96] = counts[97] = 1000;
  require(choose_flat_window(counts, FlatGoal::kSpeed).bits == 5, "many are not");
  const std::uint64_t none[256] = {};
  require(is_flat_width(choose_flat_window(none, FlatGoal::kSize).bits), "nothing fits anywhere");
}

Stored store(const CodedMatrix& coded, std::size_t segment_rows, ThreadPool& pool) {
  const Geometry& geometry = coded.geometry();
  Bytes symbols(geometry.rows * geometry.columns);
  coded.decode(pool, 0, geometry.rows, symbols.data());
  return {geometry.rows, geometry.columns, segment_rows,
          encode_flat(symbols.data(), geometry.rows, geometry.columns, segment_rows, {})};
}

void check_stored(ThreadPool& pool) {
  Random random(6);
  std::size_t patches = 0, without = 0;
  for (const std::size_t columns : {1, 65, 576, 9000}) {
    for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
      const std::size_t strays = random.coin() ? 0 : columns > 4096 ? 1 : 20;
      const Crowded c(random, blocks_of(1 + random.below(40), columns), std::size_t{1} << bits,
                      strays);
      const Stored stored = store(c.matrix, 1 + random.below(20), pool);
      const FlatMatrix flat(stored.rows, stored.columns, stored.streams(), c.matrix.scales());
      check_equal(c.matrix, flat, pool, random);
      const FlatMatrix copy(pool, flat);
      check_equal(c.matrix, copy, pool, random);
      require(copy.size_bytes() > 0 && copy.patches() == flat.patches(), "a copy has its own");
      patches += flat.patches();
      without += flat.patches() == 0;
    }
  }
  require(patches > 0 && without > 0, "stored with and without patches");
}

template <class Body>
bool is_refused(const Body& body) {
  try {
    body();
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

// Damaged streams are refused, or give wrong numbers without leaving their buffers.
void check_hostile(ThreadPool& pool) {
  Random random(7);
  const Crowded c(random, blocks_of(9, 300), 16, 30);
  const Scales scales = c.matrix.scales();
  const std::vector<float> x(300, 1.0f);
  std::size_t refused = 0;
  for (int n = 0; n < 300; ++n) {
    EncodedFlat encoded = store(c.matrix, 4, pool).encoded;
    require(encoded.patches.size() > 4, "there are patches to damage");
    const std::uint16_t bits = static_cast<std::uint16_t>(1u << random.below(16));
    switch (random.below(3)) {
      case 0:
        encoded.windows[random.below(encoded.windows.size())] ^= bits;
        break;
      case 1:
        encoded.row_sizes[random.below(encoded.row_sizes.size())] ^= bits;
        break;
      default:
        encoded.patches[random.below(encoded.patches.size())] ^= bits;
    }
    const Stored stored{9, 300, 4, std::move(encoded)};
    refused += is_refused([&] {
      const FlatMatrix flat(9, 300, stored.streams(), scales);
      const AnyMatrix matrices[] = {&flat};
      product_of(pool, matrices, x, 1, 9);
      Bytes symbols(9 * 300);
      flat.decode(pool, 0, 9, symbols.data());
    });
  }
  require(refused > 100 && refused < 300, "damage is refused where it could do harm");
  const Stored stored = store(c.matrix, 4, pool);
  for (const std::size_t wrong : {0, 1, 2, 3, 4}) {
    FlatStreams streams = stored.streams();
    if (wrong == 0) streams.fields = streams.fields.first(streams.fields.size() - 64);
    if (wrong == 1) streams.patches = streams.patches.first(streams.patches.size() - 64);
    if (wrong == 2) streams.row_sizes = streams.row_sizes.first(8);
    if (wrong == 3) streams.windows = streams.windows.first(2);
    if (wrong == 4) streams.segment_rows = 0;
    require(is_refused([&] { FlatMatrix(9, 300, streams, scales); }), "sizes must agree");
  }
}

void check_encoding() {
  Bytes symbols(9000, 100);
  symbols[8500] = 130;
  symbols[8501] = 99;
  const std::uint16_t narrow = FlatWindow{2, 100}.word();
  const EncodedFlat found = encode_flat(symbols.data(), 1, symbols.size(), 1, {&narrow, 1});
  const std::vector<FlatPatch> expected{
      make_patch(4095, 0), make_patch(4095, 0), make_patch(310, 7), make_patch(0, 7),
      make_patch(0, 7),    make_patch(0, 6),    make_patch(1, -1)};
  require(found.patches == expected, "long ways and large differences take several patches");
  Bytes wild(70000, 0);
  for (std::size_t i = 0; i < wild.size(); ++i) wild[i] = static_cast<std::uint8_t>(i % 2 * 255);
  require(is_refused([&] { encode_flat(wild.data(), 1, wild.size(), 1, {&narrow, 1}); }),
          "more patches than a row can have");
  const std::uint16_t beyond = FlatWindow{4, 250}.word();
  require(is_refused([&] { encode_flat(wild.data(), 1, wild.size(), 1, {&beyond, 1}); }),
          "a window beyond the symbols");
  require(encode_flat(wild.data(), 1, wild.size(), 1, {}).windows[0] == kWholeWindow.word(),
          "bytes where patches take more");
}

// Returns whether a damaged stream was refused; one that was not still has the coded products.
bool survives(const CodedCase& c, Random& random, ThreadPool& pool) {
  EncodedRows rows = c.rows;
  Bytes& stream = rows.sparse.empty() || random.coin() ? rows.dense : rows.sparse;
  if (!stream.empty())
    stream[random.below(stream.size())] ^= static_cast<std::uint8_t>(1 + random.below(255));
  auto& sizes = rows.sparse_sizes;
  if (sizes.size() > 1 && random.coin()) std::swap(sizes[0], sizes[random.below(sizes.size())]);
  const ExactBuffer dense = pad(rows.dense);
  const ExactBuffer sparse = pad(rows.sparse);
  const CodedMatrix matrix(c.code, c.geometry, dense.span(), sparse.span(), sizes,
                           {c.scale, c.offset, {}});
  try {
    const FlatMatrix flat(pool, matrix);
    check_equal(matrix, flat, pool, random);
    return false;
  } catch (const CorruptBlock&) {
    return true;
  }
}

}  // namespace

int main() {
  ThreadPool one(1);
  ThreadPool three(3);
  check_choice();
  check_widths(three);
  check_wide(three);
  check_misleading(one);
  check_encoding();
  check_stored(three);
  check_hostile(one);
  std::size_t refused = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    const RandomCode source(random);
    const CodedCase c(random, source);
    const ExactBuffer dense = pad(c.rows.dense);
    const ExactBuffer sparse = pad(c.rows.sparse);
    const CodedMatrix matrix(c.code, c.geometry, dense.span(), sparse.span(), c.rows.sparse_sizes,
                             {c.scale, c.offset, {}});
    ThreadPool& pool = random.coin() ? one : three;
    const FlatMatrix flat(pool, matrix);
    check_equal(matrix, flat, pool, random);
    for (int n = 0; n < 3; ++n) refused += survives(c, random, pool);
  }
  std::printf("flat_matrix: %zu of 180 damaged matrices refused\n", refused);
  require(refused > 20, "damage is noticed where lengths disagree");
}
