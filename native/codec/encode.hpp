// Encodes whole matrices; the inverse of decode_block().
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format/code.hpp"
#include "format/geometry.hpp"

namespace entrollm {

struct EncodedRows {
  std::vector<std::uint8_t> dense;
  std::vector<std::uint8_t> sparse;
  std::vector<std::uint16_t> sparse_sizes;  // bytes, one entry for each block
};

// Encodes `symbols`, row-major (geometry.rows, geometry.columns). Throws std::invalid_argument if a
// symbol is not in the code.
EncodedRows encode_rows(const Code& code, const Geometry& geometry, const std::uint8_t* symbols);

}  // namespace entrollm
