// The primitives of flat rows with a scale for each scale group of columns; format/flat.hpp has
// the layout of the fields.
//
// Sums are defined by columns, not by registers, so that every instruction set gives the same bits.
// Each chunk of 64 columns has 16 lanes of four columns. Within a run of chunks, a lane adds up its
// products of fields and 16-bit activations exactly; then, for each run in order,
// lane = fma(float(sum), scale of its group, lane) in float32. A run is a chunk where groups are
// smaller than one; otherwise it ends at the ends of groups and at multiples of kGroupedRun chunks.
// Lanes begin with the products of the groups' shifts. The 16 lanes of a row are added as a tree:
// lane i and lane i + 8, then i + 4, i + 2, i + 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/flat_kernels.hpp"

namespace entrollm {

inline constexpr std::size_t kGroupedLanes = 16;

// Chunks that one exact sum covers at most: 4 * 8 * 255 * 32639 < 2^31.
inline constexpr std::size_t kGroupedRun = 8;

// Whether groups of `columns` columns are sums of whole lanes that no chunk splits unevenly.
constexpr bool is_grouped_size(std::size_t columns) {
  return columns == 8 || columns == 16 || columns == 32 || (columns != 0 && columns % 64 == 0);
}

// Entries of a table that fields look symbols up in.
inline constexpr std::size_t kGroupedTable = 16;

// Rows of one width, 2 to 8 bits, one behind the other. With a table, the width is 3 or 4.
struct GroupedRows {
  const std::uint8_t* fields;
  std::size_t rows;
  std::size_t row_bytes;    // from a row to the next
  std::size_t first_chunk;  // of the row, a multiple of kGroupedRun
  std::size_t chunks;
  int bits;
  const std::uint8_t* table;  // the symbols of the fields; null if they are the symbols
  int symbol_bits;            // that no symbol of the table exceeds; the width without a table
  std::size_t group_columns;  // is_grouped_size
  const float* scales;        // (rows, scale_stride): those of all groups of a row
  std::size_t scale_stride;
};

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

// What the lanes of some rows begin with: the shifts of groups times the sums of activations.
struct GroupedShifts {
  const float* shifts;  // (rows, groups), and finite floats up to a whole number of lanes; or null
  std::size_t groups;
  const float* sums;        // of each vector over groups: (vectors, sums_stride)
  std::size_t sums_stride;  // groups and zeros up to a whole number of lanes
};

// Where the totals of some rows go.
struct GroupedTotals {
  std::size_t rows;
  std::size_t vectors;   // of the lanes
  std::size_t batch;     // vectors that are wanted, at most `vectors`
  const double* scales;  // of the vectors
  float* out;            // (batch, rows), `stride` floats from a vector to the next
  std::size_t stride;
};

// Digits of `vectors` vectors side by side, `chunks` times kVector columns of each.
using ReorderDigits = void (*)(std::int8_t* digits, std::size_t chunks, std::size_t vectors);

struct GroupedKernels {
  // Puts digits into the order in which product() reads them for so many vectors; null if that is
  // always the order of columns, the high digits of kVector columns first.
  ReorderDigits reorder;

  // Adds the products of rows with 1, 2, 4 or 8 vectors to lanes (rows, count, kGroupedLanes). The
  // digits are those of the first chunk on, reordered.
  void (*product)(const GroupedRows& rows, const FlatVectors& x, float* lanes);

  // Writes the lanes (rows, vectors, kGroupedLanes) that products are added to: for group i, lane
  // i % kGroupedLanes = fma(shift, sum, lane), and zeros without shifts.
  void (*begin)(const GroupedShifts& shifts, std::size_t rows, std::size_t vectors, float* lanes);

  // Writes the total of the lanes of each row and vector times the vector's scale.
  void (*totals)(const float* lanes, const GroupedTotals& totals);

  // The terms of W = symbol * scale + shift for the groups of `rows` rows from `first` on:
  // (rows, groups). `shift` is written if has_shift(); `scratch` has room for as many floats. Every
  // operation is rounded to float32.
  void (*terms)(const GroupTerms& terms, std::size_t first, std::size_t rows, float* scale,
                float* shift, float* scratch);
};

// The total of 16 lanes.
inline float grouped_total(const float* lanes) {
  float sums[8];
  for (std::size_t i = 0; i < 8; ++i) sums[i] = lanes[i] + lanes[i + 8];
  for (std::size_t half = 4; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

extern const GroupedKernels kScalarGroupedKernels;
extern const GroupedKernels kAvx2GroupedKernels;
extern const GroupedKernels kAvx2VnniGroupedKernels;
extern const GroupedKernels kAvx512GroupedKernels;
extern const GroupedKernels kNeonGroupedKernels;
extern const GroupedKernels kNeonDotGroupedKernels;

}  // namespace entrollm
