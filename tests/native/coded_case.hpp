// Random coded matrices for the tests of products.
#pragma once

#include <algorithm>

#include "codec/encode.hpp"
#include "format/geometry.hpp"
#include "support.hpp"

namespace entrollm::test {

inline Geometry random_geometry(Random& random) {
  Geometry geometry{1 + random.below(20), 1 + random.below(random.coin() ? 300 : 9000), 1, 0};
  const std::size_t width = geometry.padded_columns();
  const std::size_t widest = std::min(width, kMaxBlockColumns);
  geometry.block_columns = random.coin() ? widest : kVector * (1 + random.below(widest / kVector));
  geometry.block_rows = 1 + random.below(kMaxBlock / geometry.block_columns);
  geometry.validate();
  return geometry;
}

// A stream with its padding, in an allocation of exactly that size.
inline ExactBuffer pad(Bytes bytes) {
  bytes.resize(stored_bytes(bytes.size()));
  return ExactBuffer(bytes, 0);
}

struct CodedCase {
  Code code;
  Geometry geometry;
  Bytes symbols;
  EncodedRows rows;
  std::vector<float> scale{0.5f};
  std::vector<float> offset{-3.0f};
  std::vector<float> x;
  std::size_t batch;

  CodedCase(Random& random, const RandomCode& source)
      : code(source.code()),
        geometry(random_geometry(random)),
        batch(1 + random.below(random.coin() ? 6 : 40)) {
    symbols.resize(geometry.rows * geometry.columns);
    const std::size_t skew = random.below(10);
    for (auto& symbol : symbols) symbol = source.symbol(random, skew);
    rows = encode_rows(code, geometry, symbols.data());
    if (!code.has_sparse()) rows.sparse_sizes.clear();
    x.resize(batch * geometry.columns);
    for (auto& value : x) value = static_cast<float>(random.byte()) - 100.0f;
  }
};

}  // namespace entrollm::test
