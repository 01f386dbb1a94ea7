// The primitives of matrices with a scale for each scale group of columns.
//
// Rows are multiplied by tiles of 16. A tile's symbols are the chunks of format/flat.hpp, whose
// field 4 r + c belongs here to row r and to column c of a step of four columns. So a register of
// four-byte lanes has a row in each lane, and the sums of a group need no horizontal additions.
//
// Every instruction set gives the same bits: for each group of a row in order,
// total = fma(shift, float(sum of the group's activations), total), then for each run of the group,
// total = fma(float(sum), scale, total), where the sum of products of symbols and 16-bit
// activations over a run is exact. Runs are kGroupedRun steps, from the beginning of the group.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/flat_kernels.hpp"

namespace entrollm {

inline constexpr std::size_t kGroupedRows = 16;
inline constexpr std::size_t kStepColumns = kVector / kGroupedRows;

// Steps that one exact sum covers at most: 4 * 64 * 255 * 32639 < 2^31.
inline constexpr std::size_t kGroupedRun = 64;

// Whether groups of `columns` columns are whole steps.
constexpr bool is_grouped_size(std::size_t columns) {
  return columns != 0 && columns % kStepColumns == 0;
}

// Entries of a table that fields look symbols up in.
inline constexpr std::size_t kGroupedTable = 16;

// Fields are 2 to 8 bits wide; with a table, 3 or 4.
struct GroupedTile {
  const std::uint8_t* fields;
  std::size_t steps;
  int bits;
  const std::uint8_t* table;  // the symbols of the fields; null if they are the symbols
  int symbol_bits;            // that no symbol of the table exceeds; the width without a table
  std::size_t group_steps;
  const float* scales;  // (groups, kGroupedRows)
  const float* shifts;  // likewise, or null
};

// Activations of 1, 2, 4 or 8 vectors side by side, and their sums over groups. A step of a vector
// takes kStepBytes: the high digits of its columns and then the low ones, or whole 16-bit numbers
// of columns 0, 2, 1, 3.
struct GroupedVectors {
  const std::int8_t* digits;  // (steps, count, kStepBytes)
  std::size_t count;
  const float* sums;  // (count, sums_stride)
  std::size_t sums_stride;
};
inline constexpr std::size_t kStepBytes = 2 * kStepColumns;

// The elements of a stored array.
enum class Element : std::uint8_t { kFloat32, kHalf, kBfloat16, kUnsigned8, kSigned8 };

constexpr std::size_t element_bytes(Element type) {
  return type == Element::kFloat32                              ? 4
         : type == Element::kHalf || type == Element::kBfloat16 ? 2
                                                                : 1;
}

// Numbers of all groups of all rows, (rows, groups); integers are multiples of a float of a super
// group, (rows, super_groups), of `ratio` groups each.
struct GroupArray {
  const void* values = nullptr;  // null if absent
  Element type = Element::kFloat32;
  const void* supers = nullptr;  // null if absent
  Element super_type = Element::kFloat32;
  std::size_t ratio = 1;
};

// W = ((symbol - zero) * scale - minimum) * factor, with a zero for each group or one for all.
struct GroupTerms {
  std::size_t groups;  // of a row
  GroupArray scale;
  GroupArray zero;
  GroupArray minimum;
  float zero_of_all = 0.0f;
  float factor = 1.0f;

  bool has_shift() const {
    return zero.values != nullptr || minimum.values != nullptr || zero_of_all != 0.0f;
  }
};

struct GroupedKernels {
  bool takes_whole;  // activations, instead of digits

  // Writes the totals of a tile: (count, kGroupedRows).
  void (*product)(const GroupedTile& tile, const GroupedVectors& x, float* totals);

  // The terms of W = symbol * scale + shift for the groups of `rows` rows from `first` on:
  // (rows, groups). `shift` is written if has_shift(); `scratch` has room for as many floats. Every
  // operation is rounded to float32.
  void (*terms)(const GroupTerms& terms, std::size_t first, std::size_t rows, float* scale,
                float* shift, float* scratch);

  // From (kGroupedRows, groups) to (groups, kGroupedRows).
  void (*transpose)(const float* rows, std::size_t groups, float* out);
};

extern const GroupedKernels kScalarGroupedKernels;
extern const GroupedKernels kAvx2GroupedKernels;
extern const GroupedKernels kAvx2VnniGroupedKernels;
extern const GroupedKernels kAvx512GroupedKernels;
extern const GroupedKernels kNeonGroupedKernels;
extern const GroupedKernels kNeonDotGroupedKernels;

}  // namespace entrollm
