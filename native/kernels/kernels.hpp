// The primitives that every instruction set implements; docs/reference/format.md has the byte
// layout that they read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/flat_kernels.hpp"
#include "kernels/float_kernels.hpp"

namespace entrollm {

// Weights are processed in vectors of this many symbols; block sizes are multiples of it.
inline constexpr std::size_t kVector = 64;

// A kernel may read this many bytes past the last byte it needs, and write as many past the last
// byte it produces. Scratch buffers and the stored streams are padded accordingly (checked at
// load).
inline constexpr std::size_t kSlack = 64;

// Escaped symbols are taken from `child` in order; `child` is null when the node has no escape.
// `table` maps a field to a byte and has 64 entries; it is unused when bits == 8 (raw bytes).
struct FieldArgs {
  const std::uint8_t* fields;
  std::size_t count;
  int bits;
  const std::uint8_t* table;
  const std::uint8_t* child;
};

// One activation vector as balanced base-256 digits: x = 256 * high + low, both in [-128, 127] and
// x in 16 bits. Instruction sets without a byte product read x itself.
struct Digits {
  const std::int8_t* high;
  const std::int8_t* low;
  const std::int16_t* whole;
  const std::int64_t* sums;  // sums[i] is the sum of x before its vector i

  // The vector from `column` on, a multiple of kVector.
  Digits from(std::size_t column) const {
    return {high + column, low + column, whole + column, sums + column / kVector};
  }
};

inline constexpr std::size_t kColumnTile = 4;

// Decoded rows in panels of sixteen: vector by vector, the sixteen rows' parts one behind the
// other.
inline constexpr std::size_t kPanelRows = 16;
inline constexpr std::size_t kPanelStep = kPanelRows * kVector;  // bytes from a vector to the next
constexpr std::size_t panel_offset(std::size_t row, std::size_t vector, std::size_t row_vectors) {
  return (row / kPanelRows * row_vectors + vector) * kPanelStep + row % kPanelRows * kVector;
}

// Bytes of the panels of `rows` rows.
constexpr std::size_t panel_bytes(std::size_t rows, std::size_t row_vectors) {
  return (rows + kPanelRows - 1) / kPanelRows * row_vectors * kPanelStep;
}

// Activation vectors in groups of eight: for every 64 columns sixteen runs of 64 bytes, one for
// each four columns, with the four high digits of each activation vector and then the low ones.
inline constexpr std::size_t kGroup = 8;

// Panels times groups. Rows up to a multiple of kPanelRows are read, and their products dropped.
struct PanelProduct {
  const std::uint8_t* panels;
  std::size_t rows;
  std::size_t vectors;  // of a row
  const std::int8_t* packed;
  std::size_t groups;
  std::int64_t* sums;  // (groups, rows, kGroup), added to
};

// The product of a run with one or two groups.
inline constexpr std::size_t kMostFedGroups = 2;
struct GroupProduct {
  const std::int8_t* packed;
  std::size_t groups;
  std::size_t unit;      // row groups that are decoded together
  std::uint8_t* panels;  // room for two units
  std::int64_t* sums;    // (groups, rows of the run, kGroup), added to
};

// A code that is a chain of fields, each escaping to the next, in the form that fused products run.
inline constexpr int kMaxLevels = 16;
struct Cascade {
  int levels;
  int low_bits;
  int bits[kMaxLevels];
  const std::uint8_t* tables[kMaxLevels];  // 64 entries each
};

// The activation vectors that a fused product takes at once.
inline constexpr std::size_t kMostColumns = 4;

// Consecutive row groups of a matrix with a cascade code, and the activations to multiply by.
struct CascadeRun {
  const Cascade* code;
  const std::uint8_t* dense;  // of the first block; later ones follow it
  const std::uint8_t* sparse;
  const std::uint64_t*
      sparse_offsets;  // into `sparse`, one more than blocks; unused with one level
  std::size_t groups;
  std::size_t parts;          // blocks per group
  std::size_t block_rows;     // rows of every group but the last
  std::size_t last_rows;      // rows of the last group
  std::size_t block_columns;  // columns of every part but the last
  std::size_t last_columns;
  // The activation vectors of cascade_product: (vectors of a row, columns, high and low, kVector),
  // with 1, 2 or 4 columns.
  const std::int8_t* digits;
  std::size_t columns;
  std::uint8_t* buffer;  // room for a block, and slack
  std::uint8_t* lists;   // room for a block and slack for every level
};

// The steps of encoding. Inputs and outputs have kSlack bytes of room past their last element, but
// packed output is written exactly.
struct EncodeKernels {
  // out[i] = map[in[i] & mask], map having 256 entries. Returns all bits that any of them has set.
  std::uint8_t (*map_symbols)(const std::uint8_t* in, std::size_t count, std::uint8_t mask,
                              const std::uint8_t* map, std::uint8_t* out);

  // Bit `bit` of each field, eight fields to a byte.
  void (*pack_plane)(const std::uint8_t* fields, std::size_t count, int bit, std::uint8_t* out);

  // `width` bits (2 or 4) of each field from bit `shift` on, in packed groups; see dense_field.
  // count is a multiple of kVector.
  void (*pack_group)(const std::uint8_t* fields, std::size_t count, int shift, int width,
                     std::uint8_t* out);

  // Copies the symbols whose field is `field`, in order; returns how many.
  std::size_t (*select)(const std::uint8_t* symbols, const std::uint8_t* fields, std::size_t count,
                        std::uint8_t field, std::uint8_t* out);
};

extern const EncodeKernels kScalarEncodeKernels;

struct Kernels {
  const char* name;

  // Fields stored as `bits` planes of ceil(count / 8) bytes. Returns how many escapes it met among
  // the first `count` fields.
  std::size_t (*sparse_field)(const FieldArgs& args, std::uint8_t* out);

  // Fields stored as packed groups of 4, 2 and 1 bits; count is a multiple of kVector. Returns the
  // number of escapes.
  std::size_t (*dense_field)(const FieldArgs& args, std::uint8_t* out);

  // out[i] is the next symbol of `right` where bit i of `plane` is set, else the next of `left`.
  void (*split)(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
                const std::uint8_t* right, std::uint8_t* out);

  // Ors the dense fields of `bits` bits into `out`; count is a multiple of kVector.
  void (*or_low_bits)(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out);

  // Number of positions below `count` at which all of the `bits` planes are set.
  std::size_t (*count_all_ones)(const std::uint8_t* planes, std::size_t count, int bits);

  // Exact integer products of `count` weights (a multiple of kVector, at most 64 * kVector) with
  // the digits of one, or of kColumnTile, activation vectors.
  std::int64_t (*dot)(const std::uint8_t* weights, const Digits& x, std::size_t count);
  void (*dot_tile)(const std::uint8_t* weights, const Digits* x, std::size_t count,
                   std::int64_t* out);

  // Optional: dot_tile for two rows that lie `stride` bytes apart; `out` has a row after the other.
  void (*dot_tile_pair)(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                        std::size_t count, std::int64_t* out) = nullptr;

  // Optional: the product of a run, decoded and multiplied in one pass; sums are (rows, columns).
  // Needs bits[0] <= 6 and low_bits <= 4. Returns the number of blocks, or the first block that
  // does not decode to its stated length.
  std::size_t (*cascade_product)(const CascadeRun& run, std::int64_t* sums) = nullptr;

  // Optional, and then all: decodes a run into panels, and multiplies panels; and decodes a run and
  // multiplies it with one or two groups in one pass. The first and last return what
  // cascade_product does.
  std::size_t (*cascade_panels)(const CascadeRun& run, std::uint8_t* panels) = nullptr;
  void (*panel_product)(const PanelProduct& product) = nullptr;
  std::size_t (*cascade_groups)(const CascadeRun& run, const GroupProduct& product) = nullptr;

  const EncodeKernels* encode = &kScalarEncodeKernels;
  const FlatKernels* flat = &kScalarFlatKernels;
  const FloatKernels* floats = &kPortableFloatKernels;
};

// Bytes that `count` dense fields of `bits` bits take: groups of 4, 2 and 1 bits, or raw bytes.
constexpr std::size_t dense_bytes(std::size_t count, int bits) {
  if (bits == 8) return count;
  std::size_t total = 0;
  if (bits & 4) total += (count + 127) / 128 * 64;
  if (bits & 2) total += (count + 255) / 256 * 64;
  if (bits & 1) total += count / 8;
  return total;
}

// Bytes of a stored stream of `size` bytes with its padding.
constexpr std::size_t stored_bytes(std::size_t size) { return (size + kSlack + 63) / 64 * 64; }

constexpr std::size_t sparse_bytes(std::size_t count, int bits) {
  return bits == 8 ? count : static_cast<std::size_t>(bits) * ((count + 7) / 8);
}

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx2VnniKernels;  // the AVX2 kernels with AVX-VNNI products
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;  // the AVX-512 kernels with products of panels
extern const Kernels kNeonKernels;
extern const Kernels kNeonDotKernels;  // the NEON kernels with the ARMv8.2 dot product

// Kernels that this build has, and whether this processor runs them.
struct BuiltKernels {
  const Kernels* kernels;
  bool runs;
};

// Fastest first.
std::span<const BuiltKernels> built_kernels();

// The fastest kernels this processor runs, or those that ENTROLLM_ISA names; throws
// std::invalid_argument when the named set is unknown or the processor lacks it.
const Kernels& select_kernels(const char* name);

// The kernels in use: selected once, with the environment variable ENTROLLM_ISA.
const Kernels& kernels();

}  // namespace entrollm
