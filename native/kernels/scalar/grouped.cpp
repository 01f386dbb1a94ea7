// Portable kernels of group scales: the plain statement of what the vector versions compute.
#include <algorithm>
#include <bit>
#include <cmath>

#include "format/flat.hpp"
#include "kernels/generic/group_terms.hpp"
#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

// The end of the run that begins at chunk `at`.
std::size_t end_of_run(const GroupedRows& rows, std::size_t at) {
  const std::size_t end = rows.first_chunk + rows.chunks;
  if (rows.group_columns < kVector) return at + 1;
  const std::size_t group_chunks = rows.group_columns / kVector;
  return std::min(
      {end, (at / group_chunks + 1) * group_chunks, (at / kGroupedRun + 1) * kGroupedRun});
}

void product(const GroupedRows& rows, const FlatVectors& x, float* lanes) {
  constexpr std::size_t kColumns = kVector / kGroupedLanes;  // of a lane in a chunk
  for (std::size_t row = 0; row < rows.rows; ++row, lanes += x.count * kGroupedLanes) {
    const std::uint8_t* fields = rows.fields + row * rows.row_bytes;
    const float* scales = rows.scales + row * rows.scale_stride;
    const std::size_t end = rows.first_chunk + rows.chunks;
    for (std::size_t at = rows.first_chunk; at < end;) {
      const std::size_t stop = end_of_run(rows, at);
      for (std::size_t vector = 0; vector < x.count; ++vector) {
        for (std::size_t lane = 0; lane < kGroupedLanes; ++lane) {
          std::int32_t sum = 0;
          for (std::size_t chunk = at; chunk < stop; ++chunk) {
            const std::size_t local = chunk - rows.first_chunk;
            const std::int8_t* digits = x.digits + (local * x.count + vector) * 2 * kVector;
            for (std::size_t k = lane * kColumns; k < (lane + 1) * kColumns; ++k) {
              const std::uint8_t field =
                  flat_field(fields + local * flat_chunk_bytes(rows.bits), rows.bits, k);
              const std::int32_t symbol = rows.table == nullptr ? field : rows.table[field];
              sum += symbol * (256 * digits[k] + digits[kVector + k]);
            }
          }
          const std::size_t group = (at * kVector + lane * kColumns) / rows.group_columns;
          float& out = lanes[vector * kGroupedLanes + lane];
          out = std::fma(static_cast<float>(sum), scales[group], out);
        }
      }
      at = stop;
    }
  }
}

void begin(const GroupedShifts& shifts, std::size_t rows, std::size_t vectors, float* lanes) {
  std::fill_n(lanes, rows * vectors * kGroupedLanes, 0.0f);
  if (shifts.shifts == nullptr) return;
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t vector = 0; vector < vectors; ++vector, lanes += kGroupedLanes) {
      const float* sums = shifts.sums + vector * shifts.sums_stride;
      for (std::size_t i = 0; i < shifts.groups; ++i) {
        float& lane = lanes[i % kGroupedLanes];
        lane = std::fma(shifts.shifts[row * shifts.groups + i], sums[i], lane);
      }
    }
  }
}

void write_totals(const float* lanes, const GroupedTotals& totals) {
  for (std::size_t row = 0; row < totals.rows; ++row) {
    for (std::size_t b = 0; b < totals.batch; ++b) {
      const float total = grouped_total(lanes + (row * totals.vectors + b) * kGroupedLanes);
      totals.out[b * totals.stride + row] = static_cast<float>(total * totals.scales[b]);
    }
  }
}

float widen_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t exponent = half >> 10 & 31u, mantissa = half & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float small = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -small : small;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

void widen_halves(const std::uint16_t* halves, std::size_t count, float* out) {
  std::transform(halves, halves + count, out, widen_half);
}

}  // namespace

const GroupedKernels kScalarGroupedKernels = {.reorder = nullptr,
                                              .product = product,
                                              .begin = begin,
                                              .totals = write_totals,
                                              .terms = write_group_terms<widen_halves>};

}  // namespace entrollm
