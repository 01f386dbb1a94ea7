// Checks that two forms of a matrix have the same symbols, rows and products.
#pragma once

#include <cstring>

#include "codec/flat_encode.hpp"
#include "coded_case.hpp"
#include "product/flat_matrix.hpp"
#include "product/product.hpp"

namespace entrollm::test {

inline std::vector<float> product_of(ThreadPool& pool, std::span<const AnyMatrix> matrices,
                                     const std::vector<float>& x, std::size_t batch,
                                     std::size_t outputs) {
  std::vector<float> y(batch * outputs, -1.0f);
  multiply(pool, matrices, x.data(), batch, y.data());
  return y;
}

inline bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class Other>
void check_equal(const CodedMatrix& coded, const Other& other, ThreadPool& pool, Random& random) {
  const Geometry& geometry = coded.geometry();
  Bytes symbols(geometry.rows * geometry.columns), found(symbols.size());
  coded.decode(pool, 0, geometry.rows, symbols.data());
  other.decode(pool, 0, geometry.rows, found.data());
  require(symbols == found, "another form has the same symbols");
  const std::vector<std::int64_t> rows{static_cast<std::int64_t>(random.below(geometry.rows)), 0};
  std::vector<float> values(2 * geometry.columns), expected(values.size());
  coded.dequantize(pool, rows, expected.data());
  other.dequantize(pool, rows, values.data());
  require(equal(values, expected), "its rows have the same values");
  for (const std::size_t batch : {1, 2, 3, 8, 9, 40}) {
    std::vector<float> x(batch * geometry.columns);
    for (auto& value : x) value = static_cast<float>(random.byte()) - 100.0f;
    const AnyMatrix coded_only[] = {&coded}, other_only[] = {&other},
                    mixed[] = {&other, &coded, &other};
    const auto y = product_of(pool, coded_only, x, batch, geometry.rows);
    require(equal(product_of(pool, other_only, x, batch, geometry.rows), y), "the same products");
    const auto joined = product_of(pool, mixed, x, batch, 3 * geometry.rows);
    for (std::size_t i = 0; i < joined.size(); ++i) {
      const std::size_t b = i / (3 * geometry.rows), row = i % geometry.rows;
      require(joined[i] == y[b * geometry.rows + row], "also beside coded matrices");
    }
  }
}

// A flat matrix in its stored form, in allocations of exactly its size.
struct Stored {
  std::size_t rows;
  std::size_t columns;
  std::size_t segment_rows;
  EncodedFlat encoded;
  ExactBuffer fields{pad(encoded.fields)};
  ExactBuffer patches{pad(bytes_of(encoded.patches))};
  std::vector<std::uint16_t> sizes =
      encoded.patches.empty() ? std::vector<std::uint16_t>{} : encoded.row_sizes;

  static Bytes bytes_of(const std::vector<FlatPatch>& patches) {
    Bytes bytes(patches.size() * sizeof(FlatPatch));
    if (!bytes.empty()) std::memcpy(bytes.data(), patches.data(), bytes.size());
    return bytes;
  }

  FlatStreams streams() const {
    return {segment_rows, fields.span(), patches.span(), sizes, encoded.windows};
  }
};

}  // namespace entrollm::test
