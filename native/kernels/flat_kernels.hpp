// The primitives of the flat form; format/flat.hpp has the layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/flat.hpp"

namespace entrollm {

// Activation vectors that a flat product takes at most, and those that share the unpacking of a
// row: more would not leave their digits in the first-level cache.
inline constexpr std::size_t kMostFlatVectors = 8;
inline constexpr std::size_t kFlatGroup = 4;

// Rows of one width, 2 to 7 bits, one behind the other.
struct FlatRows {
  const std::uint8_t* fields;
  std::size_t rows;
  std::size_t chunks;  // of a row
  int bits;
};

// 1, 2, 4 or 8 activation vectors side by side: (chunks, count, high and low, kVector).
struct FlatVectors {
  const std::int8_t* digits;
  std::size_t count;
};

// The weights of some rows that differ from their field plus base; all columns are the rows'.
struct FlatPatches {
  const std::uint32_t* first;  // (rows + 1): where each row's patches begin
  const FlatPatch* words;
};

struct FlatKernels {
  // Writes chunks * kVector symbols as fields of `bits` bits, 2 to 8: a symbol less `base`, clipped
  // to [0, 2^bits). `fields` gets flat_row_bytes(chunks, bits) bytes.
  void (*pack)(const std::uint8_t* symbols, std::size_t chunks, int bits, std::uint8_t base,
               std::uint8_t* fields);

  // Writes chunks * kVector symbols: fields plus `base`, which must not exceed 255.
  void (*unpack)(const std::uint8_t* fields, std::size_t chunks, int bits, std::uint8_t base,
                 std::uint8_t* symbols);

  // The exact products of fields and at most kFlatGroup vectors, to sums[row * stride + vector].
  void (*product)(const FlatRows& rows, const FlatVectors& x, std::int64_t* sums,
                  std::size_t stride);

  // Adds the products of `rows` rows' differences with `count` whole activation vectors, given as
  // (columns, count), to sums (rows, count). Counts are those of FlatVectors.
  void (*add_patches)(const FlatPatches& patches, std::size_t rows, const std::int16_t* whole,
                      std::size_t count, std::int64_t* sums);
};

extern const FlatKernels kScalarFlatKernels;
extern const FlatKernels kAvx2FlatKernels;
extern const FlatKernels kAvx2VnniFlatKernels;
extern const FlatKernels kAvx512FlatKernels;
extern const FlatKernels kNeonFlatKernels;
extern const FlatKernels kNeonDotFlatKernels;

}  // namespace entrollm
