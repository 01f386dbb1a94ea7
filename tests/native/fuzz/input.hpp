// What the fuzzers of matrices make of their input.
#pragma once

#include <optional>

#include "../coded_case.hpp"
#include "product/matrix.hpp"

namespace entrollm::test {

// Numbers from the input; zeros behind its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data, size) {}
  std::size_t byte() {
    if (data_.empty()) return 0;
    const std::uint8_t value = data_[0];
    data_ = data_.subspan(1);
    return value;
  }
  std::size_t word() { return byte() | byte() << 8; }
  bool empty() const { return data_.empty(); }

 private:
  std::span<const std::uint8_t> data_;
};

inline Geometry small_geometry(Input& input) {
  Geometry geometry{1 + input.byte() % 12, 1 + input.word() % 700, 1, kVector};
  const std::size_t chunks = geometry.padded_columns() / kVector;
  geometry.block_columns = kVector * (1 + input.byte() % chunks);
  geometry.block_rows = 1 + input.byte() % (kMaxBlock / geometry.block_columns);
  geometry.validate();
  return geometry;
}

// Streams of random symbols with some bytes changed, or of the input's own bytes.
inline EncodedRows streams(Input& input, const RandomCode& source, const Code& code,
                           const Geometry& geometry, Random& random) {
  EncodedRows rows;
  if (input.byte() % 2 == 0) {
    Bytes symbols(geometry.rows * geometry.columns);
    for (auto& symbol : symbols) symbol = source.symbol(random, 4);
    rows = encode_rows(code, geometry, symbols.data());
    while (!input.empty()) {
      Bytes& stream = input.byte() % 4 == 0 ? rows.dense : rows.sparse;
      const std::size_t at = input.word();
      const auto value = static_cast<std::uint8_t>(input.byte());
      if (!stream.empty()) stream[at % stream.size()] = value;
    }
  } else {
    for (std::size_t i = 0; i < geometry.blocks(); ++i) {
      rows.sparse_sizes.push_back(static_cast<std::uint16_t>(input.byte()));
    }
    std::size_t sum = 0;
    for (const auto size : rows.sparse_sizes) sum += size;
    for (std::size_t i = 0; i < sum; ++i) {
      rows.sparse.push_back(static_cast<std::uint8_t>(input.byte()));
    }
    rows.dense.resize(geometry.dense_size(code));
    for (auto& byte : rows.dense) byte = static_cast<std::uint8_t>(input.byte());
  }
  if (!code.has_sparse()) {
    rows.sparse.clear();
    rows.sparse_sizes.clear();
  }
  return rows;
}

using Product = std::optional<std::vector<float>>;

// What `compute` writes, or nothing if a block is corrupt.
template <class Compute>
Product product(std::size_t size, const Compute& compute) {
  std::vector<float> y(size);
  try {
    compute(y.data());
  } catch (const CorruptBlock&) {
    return std::nullopt;
  }
  return y;
}

inline void require_equal(const Product& left, const Product& right, const char* what) {
  require(left.has_value() == right.has_value(), std::string(what) + " is refused alike");
  require(!left || std::memcmp(left->data(), right->data(), left->size() * sizeof(float)) == 0,
          std::string(what) + " has the same bits");
}

}  // namespace entrollm::test
