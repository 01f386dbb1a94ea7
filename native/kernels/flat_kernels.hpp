// The primitives of the flat form; format/flat.hpp has the layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {

struct FlatKernels {
  // Writes chunks * kVector symbols as fields of `bits` bits, 2 to 8: a symbol less `base`, clipped
  // to [0, 2^bits). `fields` gets flat_row_bytes(chunks, bits) bytes.
  void (*pack)(const std::uint8_t* symbols, std::size_t chunks, int bits, std::uint8_t base,
               std::uint8_t* fields);

  // Writes chunks * kVector symbols: fields plus `base`, which must not exceed 255.
  void (*unpack)(const std::uint8_t* fields, std::size_t chunks, int bits, std::uint8_t base,
                 std::uint8_t* symbols);
};

extern const FlatKernels kScalarFlatKernels;
extern const FlatKernels kAvx2FlatKernels;
extern const FlatKernels kAvx2VnniFlatKernels;
extern const FlatKernels kAvx512FlatKernels;
extern const FlatKernels kNeonFlatKernels;
extern const FlatKernels kNeonDotFlatKernels;

}  // namespace entrollm
