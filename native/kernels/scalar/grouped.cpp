// Portable kernels of group scales: the plain statement of what the vector versions compute.
#include <algorithm>
#include <bit>
#include <cmath>

#include "format/flat.hpp"
#include "kernels/generic/group_terms.hpp"
#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

std::int32_t symbol_of(const GroupedTile& tile, std::size_t step, std::size_t place) {
  const std::uint8_t field =
      flat_field(tile.fields + step * flat_chunk_bytes(tile.bits), tile.bits, place);
  return tile.table == nullptr ? field : tile.table[field];
}

void product(const GroupedTile& tile, const GroupedVectors& x, float* totals) {
  for (std::size_t vector = 0; vector < x.count; ++vector) {
    for (std::size_t row = 0; row < kGroupedRows; ++row) {
      float total = 0.0f;
      for (std::size_t at = 0, group = 0; at < tile.steps; ++group) {
        const std::size_t end = at + std::min(tile.group_steps, tile.steps - at);
        const std::size_t term = group * kGroupedRows + row;
        if (tile.shifts != nullptr) {
          total = std::fma(tile.shifts[term], x.sums[vector * x.sums_stride + group], total);
        }
        while (at < end) {
          const std::size_t stop = at + std::min(kGroupedRun, end - at);
          std::int32_t sum = 0;
          for (; at < stop; ++at) {
            const std::int8_t* digits = x.digits + (at * x.count + vector) * kStepBytes;
            for (std::size_t c = 0; c < kStepColumns; ++c) {
              sum += symbol_of(tile, at, row * kStepColumns + c) *
                     (256 * digits[c] + digits[kStepColumns + c]);
            }
          }
          total = std::fma(static_cast<float>(sum), tile.scales[term], total);
        }
      }
      totals[vector * kGroupedRows + row] = total;
    }
  }
}

void transpose(const float* rows, std::size_t groups, float* out) {
  transpose_groups(rows, 0, groups, out);
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

const GroupedKernels kScalarGroupedKernels = {.takes_whole = false,
                                              .product = product,
                                              .terms = write_group_terms<widen_halves>,
                                              .transpose = transpose};

}  // namespace entrollm
