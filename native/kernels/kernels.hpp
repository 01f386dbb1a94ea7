// The primitives that every instruction set implements. docs/reference/format.md has the layouts
// that they read and write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/layout.hpp"
#include "kernels/flat_kernels.hpp"
#include "kernels/float_kernels.hpp"
#include "kernels/grouped_kernels.hpp"
#include "kernels/lossless_kernels.hpp"

namespace entrollm {

// Fields to decode. Escaped symbols are taken from `child` in order; `child` is null if the node
// has no escape. `table` maps a field to a symbol and has 64 entries; raw fields do not use it.
struct FieldArgs {
  const std::uint8_t* fields;
  std::size_t count;
  int bits;  // 1 to kMaxFieldBits, or kRawBits: class Code has checked it
  const std::uint8_t* table;
  const std::uint8_t* child;
};

// One activation vector as balanced base-256 digits: x = 256 * high + low, where both digits are in
// [-128, 127] and x has 16 bits. Instruction sets without a product of bytes read x itself.
struct Digits {
  const std::int8_t* high;
  const std::int8_t* low;
  const std::int16_t* whole;
  const std::int64_t* sums;  // sums[i] is the sum of x before its vector i

  // The columns from `column` on, which is a multiple of kVector.
  Digits from(std::size_t column) const {
    return {high + column, low + column, whole + column, sums + column / kVector};
  }
};

// The activation vectors that dot_tile multiplies at once, and the most rows and columns of
// dot_tile_rows.
inline constexpr std::size_t kColumnTile = 4;
inline constexpr std::size_t kMostDotRows = 8;
inline constexpr std::size_t kDotRowsColumns = 32 * kVector;

// Decoded rows are stored in panels of sixteen rows: the first vectors of all sixteen rows, then
// their second vectors, and so on.
inline constexpr std::size_t kPanelRows = 16;
inline constexpr std::size_t kPanelStep = kPanelRows * kVector;  // bytes from a vector to the next

// Where vector `vector` of row `row` lies in the panels of rows of `row_vectors` vectors.
constexpr std::size_t panel_offset(std::size_t row, std::size_t vector, std::size_t row_vectors) {
  return (row / kPanelRows * row_vectors + vector) * kPanelStep + row % kPanelRows * kVector;
}

// Bytes of the panels of `rows` rows.
constexpr std::size_t panel_bytes(std::size_t rows, std::size_t row_vectors) {
  return (rows + kPanelRows - 1) / kPanelRows * row_vectors * kPanelStep;
}

// A digit group is eight activation vectors, stored for the matrix unit. Every 64 columns take
// sixteen runs of 64 bytes. A run covers four columns: it has the four high digits of each of the
// eight vectors, then their low digits.
inline constexpr std::size_t kDigitGroup = 8;

// The product of panels with digit groups. Rows up to a multiple of kPanelRows are read, and the
// products of those past `rows` are dropped.
struct PanelProduct {
  const std::uint8_t* panels;
  std::size_t rows;
  std::size_t vectors;  // of a row
  const std::int8_t* digits;
  std::size_t digit_groups;
  std::int64_t* sums;  // (digit_groups, rows, kDigitGroup), added to
};

// The product of a run with at most kMostFusedDigitGroups digit groups, decoded and multiplied in
// one pass.
inline constexpr std::size_t kMostFusedDigitGroups = 2;
struct FusedPanelProduct {
  const std::int8_t* digits;
  std::size_t digit_groups;
  std::size_t unit;      // row blocks that are decoded together
  std::uint8_t* panels;  // room for two units
  std::int64_t* sums;    // (digit_groups, rows of the run, kDigitGroup), added to
};

// A code that is a chain of fields, each of which escapes to the next, in the form that fused
// products take.
inline constexpr int kMaxLevels = 16;
inline constexpr int kMaxCascadeLowBits = 4;
struct Cascade {
  int levels;
  int low_bits;
  int bits[kMaxLevels];
  const std::uint8_t* tables[kMaxLevels];  // 64 entries each
};

// The activation vectors that a fused product takes at once.
inline constexpr std::size_t kMostColumns = 4;

// Consecutive row blocks of a matrix with a cascade code, and the activations to multiply by.
struct CascadeRun {
  const Cascade* code;
  const std::uint8_t* dense;  // of the first block; those of later blocks follow
  const std::uint8_t* sparse;
  // Where each block begins in `sparse`, and where the last one ends; unused with one level.
  const std::uint64_t* sparse_offsets;
  std::size_t row_blocks;
  std::size_t parts;          // blocks in a row block
  std::size_t block_rows;     // rows of every row block but the last
  std::size_t last_rows;      // rows of the last row block
  std::size_t block_columns;  // columns of every part but the last
  std::size_t last_columns;   // columns of the last part
  // The activation vectors of cascade_product, 1, 2 or 4 of them as `columns`:
  // (vectors of a row, columns, high and low digits, kVector).
  const std::int8_t* digits;
  std::size_t columns;
  std::uint8_t* buffer;  // room for a block, and slack
  std::uint8_t* lists;   // room for a block and slack for every level
};

// The steps of encoding. Inputs and outputs have kSlack bytes of room past their last element;
// packed output is written without slack.
struct EncodeKernels {
  // out[i] = map[in[i] & mask], where map has 256 entries. Returns the OR of all results.
  std::uint8_t (*map_symbols)(const std::uint8_t* in, std::size_t count, std::uint8_t mask,
                              const std::uint8_t* map, std::uint8_t* out);

  // Packs bit `bit` of each field, eight fields to a byte.
  void (*pack_plane)(const std::uint8_t* fields, std::size_t count, int bit, std::uint8_t* out);

  // Packs the `width` bits (2 or 4) from bit `shift` of each field in the dense layout. `count` is
  // a multiple of kVector.
  void (*pack_fields)(const std::uint8_t* fields, std::size_t count, int shift, int width,
                      std::uint8_t* out);

  // Copies the symbols whose field is `field`, in order, and returns their number.
  std::size_t (*select)(const std::uint8_t* symbols, const std::uint8_t* fields, std::size_t count,
                        std::uint8_t field, std::uint8_t* out);
};

extern const EncodeKernels kScalarEncodeKernels;
extern const EncodeKernels kAvx2EncodeKernels;

struct Kernels {
  const char* name;

  // Decodes fields in the sparse layout. Returns the number of escapes among the first `count`
  // fields.
  std::size_t (*sparse_field)(const FieldArgs& args, std::uint8_t* out);

  // Decodes fields in the dense layout; `count` is a multiple of kVector. Returns the number of
  // escapes.
  std::size_t (*dense_field)(const FieldArgs& args, std::uint8_t* out);

  // out[i] is the next symbol of `right` if bit i of `plane` is set, else the next of `left`.
  void (*split)(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
                const std::uint8_t* right, std::uint8_t* out);

  // ORs fields of `bits` bits in the dense layout into `out`; `count` is a multiple of kVector.
  void (*or_low_bits)(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out);

  // The number of positions below `count` at which all of the `bits` planes are set.
  std::size_t (*count_all_ones)(const std::uint8_t* planes, std::size_t count, int bits);

  // Exact integer products of `count` weights (a multiple of kVector, at most 64 * kVector) with
  // the digits of one, or of kColumnTile, activation vectors.
  std::int64_t (*dot)(const std::uint8_t* weights, const Digits& x, std::size_t count);
  void (*dot_tile)(const std::uint8_t* weights, const Digits* x, std::size_t count,
                   std::int64_t* out);

  // Optional. dot_tile for dot_rows rows, at most kMostDotRows, that lie `stride` bytes apart, and
  // at most kDotRowsColumns weights of each; `out` is (dot_rows, kColumnTile).
  void (*dot_tile_rows)(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                        std::size_t count, std::int64_t* out) = nullptr;
  std::size_t dot_rows = 2;

  // Optional. The product of a run, decoded and multiplied in one pass; `sums` is (rows, columns).
  // The code has no raw root and at most kMaxCascadeLowBits low bits. Returns the number of blocks,
  // or the first block that does not decode to its stated length.
  std::size_t (*cascade_product)(const CascadeRun& run, std::int64_t* sums) = nullptr;

  // Optional; an instruction set has all three or none. cascade_panels decodes a run into panels,
  // and panel_product multiplies panels. cascade_digit_groups decodes a run and multiplies it with
  // one or two digit groups in one pass. Both that decode return what cascade_product returns.
  std::size_t (*cascade_panels)(const CascadeRun& run, std::uint8_t* panels) = nullptr;
  void (*panel_product)(const PanelProduct& product) = nullptr;
  std::size_t (*cascade_digit_groups)(const CascadeRun& run,
                                      const FusedPanelProduct& product) = nullptr;

  const EncodeKernels* encode = &kScalarEncodeKernels;
  const FlatKernels* flat = &kScalarFlatKernels;
  const GroupedKernels* grouped = &kScalarGroupedKernels;
  const LosslessKernels* lossless = &kScalarLosslessKernels;
  const FloatKernels* floats = &kPortableFloatKernels;
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx2VnniKernels;  // the AVX2 kernels with AVX-VNNI products
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;  // the AVX-512 kernels with products of panels
extern const Kernels kNeonKernels;
extern const Kernels kNeonDotKernels;   // the NEON kernels with the ARMv8.2 dot product
extern const Kernels kNeonI8mmKernels;  // these with products of 8-bit matrices for many vectors

// A set of kernels that this build has.
struct BuiltKernels {
  const Kernels* kernels;
  bool runs;  // whether this processor has the instructions
};

// All sets that this build has, the fastest first.
std::span<const BuiltKernels> built_kernels();

// The kernels called `name`, or the fastest that this processor runs if `name` is null or empty.
// Throws std::invalid_argument if the name is unknown or the processor lacks the instructions.
const Kernels& select_kernels(const char* name);

// The kernels in use, selected once: those that the environment variable ENTROLLM_ISA names, or the
// fastest.
const Kernels& kernels();

}  // namespace entrollm
