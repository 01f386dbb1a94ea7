// Portable flat kernels: the plain statement of what the vector versions compute.
#include "format/flat.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/flat_kernels.hpp"

namespace entrollm {
namespace {

void pack(const std::uint8_t* symbols, std::size_t chunks, int bits, std::uint8_t base,
          std::uint8_t* fields) {
  std::memset(fields, 0, flat_row_bytes(chunks, bits));
  for (std::size_t i = 0; i < chunks; ++i) {
    for (std::size_t column = 0; column < kVector; ++column) {
      const int field = std::clamp(*symbols++ - base, 0, (1 << bits) - 1);
      set_flat_field(fields + i * flat_chunk_bytes(bits), bits, column,
                     static_cast<std::uint8_t>(field));
    }
  }
}

void unpack(const std::uint8_t* fields, std::size_t chunks, int bits, std::uint8_t base,
            std::uint8_t* symbols) {
  for (std::size_t i = 0; i < chunks; ++i, fields += flat_chunk_bytes(bits)) {
    for (std::size_t column = 0; column < kVector; ++column) {
      *symbols++ = static_cast<std::uint8_t>(flat_field(fields, bits, column) + base);
    }
  }
}

}  // namespace

const FlatKernels kScalarFlatKernels = {.pack = pack, .unpack = unpack};

}  // namespace entrollm
