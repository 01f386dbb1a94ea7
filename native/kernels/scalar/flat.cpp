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

void product(const FlatRows& rows, const FlatVectors& x, std::int64_t* sums, std::size_t stride) {
  const std::uint8_t* chunk = rows.fields;
  for (std::size_t row = 0; row < rows.rows; ++row, sums += stride) {
    std::fill_n(sums, x.count, std::int64_t{0});
    const std::int8_t* digits = x.digits;
    for (std::size_t i = 0; i < rows.chunks; ++i, chunk += flat_chunk_bytes(rows.bits)) {
      std::int32_t fields[kVector];
      for (std::size_t k = 0; k < kVector; ++k) fields[k] = flat_field(chunk, rows.bits, k);
      for (std::size_t vector = 0; vector < x.count; ++vector, digits += 2 * kVector) {
        std::int32_t high = 0, low = 0;
        for (std::size_t k = 0; k < kVector; ++k) {
          high += fields[k] * digits[k];
          low += fields[k] * digits[kVector + k];
        }
        sums[vector] += std::int64_t{256} * high + low;
      }
    }
  }
}

void add_patches(const FlatPatches& patches, std::size_t rows, const std::int16_t* whole,
                 std::size_t count, std::int64_t* sums) {
  for (std::size_t row = 0; row < rows; ++row, sums += count) {
    std::size_t column = 0;
    for (std::size_t at = patches.first[row]; at < patches.first[row + 1]; ++at) {
      column += patch_gap(patches.words[at]);
      for (std::size_t i = 0; i < count; ++i) {
        sums[i] += std::int64_t{patch_difference(patches.words[at])} * whole[column * count + i];
      }
    }
  }
}

}  // namespace

const FlatKernels kScalarFlatKernels = {
    .pack = pack, .unpack = unpack, .product = product, .add_patches = add_patches};

}  // namespace entrollm
