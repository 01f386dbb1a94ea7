// The scales and shifts of some rows' groups, from the types in which they are stored. Loops that
// compilers turn into vectors; internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <bit>

#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

// The groups from `begin` on of kGroupedRows rows, as GroupedKernels::transpose writes them.
inline void transpose_groups(const float* rows, std::size_t begin, std::size_t groups, float* out) {
  for (std::size_t group = begin; group < groups; ++group) {
    for (std::size_t row = 0; row < kGroupedRows; ++row) {
      out[group * kGroupedRows + row] = rows[row * groups + group];
    }
  }
}

using WidenHalves = void (*)(const std::uint16_t*, std::size_t, float*);

template <WidenHalves Halves>
void widen_elements(const void* values, Element type, std::size_t first, std::size_t count,
                    float* out) {
  switch (type) {
    case Element::kFloat32:
      __builtin_memcpy(out, static_cast<const float*>(values) + first, count * sizeof *out);
      return;
    case Element::kHalf:
      return Halves(static_cast<const std::uint16_t*>(values) + first, count, out);
    case Element::kBfloat16: {
      const auto* in = static_cast<const std::uint16_t*>(values) + first;
      for (std::size_t i = 0; i < count; ++i) {
        out[i] = std::bit_cast<float>(static_cast<std::uint32_t>(in[i]) << 16);
      }
      return;
    }
    case Element::kUnsigned8: {
      const auto* in = static_cast<const std::uint8_t*>(values) + first;
      for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
      return;
    }
    case Element::kSigned8: {
      const auto* in = static_cast<const std::int8_t*>(values) + first;
      for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
    }
  }
}

// Multiplies each `ratio` numbers by one of a super group's.
template <std::size_t Ratio>
void multiply_by_supers(const float* supers, std::size_t count, float* out) {
  for (std::size_t i = 0; i < count; ++i, out += Ratio) {
    for (std::size_t k = 0; k < Ratio; ++k) out[k] *= supers[i];
  }
}

inline void multiply_by_supers(const float* supers, std::size_t groups, std::size_t ratio,
                               float* out) {
  if (groups % ratio == 0 && ratio == 8) return multiply_by_supers<8>(supers, groups / 8, out);
  if (groups % ratio == 0 && ratio == 16) return multiply_by_supers<16>(supers, groups / 16, out);
  for (std::size_t i = 0; i < groups; ++i) out[i] *= supers[i / ratio];
}

template <WidenHalves Halves>
void widen_groups(const GroupArray& array, std::size_t first, std::size_t rows, std::size_t groups,
                  float* out) {
  widen_elements<Halves>(array.values, array.type, first * groups, rows * groups, out);
  if (array.supers == nullptr) return;
  // Super groups of whole groups lie behind each other through all rows, as one long row.
  std::size_t supers = (groups + array.ratio - 1) / array.ratio;
  std::size_t begin = first * supers;
  if (groups % array.ratio == 0) {
    groups *= rows;
    supers *= rows;
    rows = 1;
  }
  constexpr std::size_t kSome = 64;
  float some[kSome];
  for (std::size_t row = 0; row < rows; ++row, begin += supers, out += groups) {
    for (std::size_t i = 0; i < supers; i += kSome) {
      const std::size_t count = supers - i < kSome ? supers - i : kSome;
      widen_elements<Halves>(array.supers, array.super_type, begin + i, count, some);
      const std::size_t at = i * array.ratio, left = groups - at;
      multiply_by_supers(some, count * array.ratio < left ? count * array.ratio : left, array.ratio,
                         out + at);
    }
  }
}

template <WidenHalves Halves>
void write_group_terms(const GroupTerms& terms, std::size_t first, std::size_t rows, float* scale,
                       float* shift, float* scratch) {
  const std::size_t groups = terms.groups, count = rows * groups;
  widen_groups<Halves>(terms.scale, first, rows, groups, scale);
  if (terms.has_shift()) {
    if (terms.zero.values != nullptr) {
      widen_groups<Halves>(terms.zero, first, rows, groups, shift);
      for (std::size_t i = 0; i < count; ++i) shift[i] = scale[i] * -shift[i];
    } else {
      for (std::size_t i = 0; i < count; ++i) shift[i] = scale[i] * -terms.zero_of_all;
    }
    if (terms.minimum.values != nullptr) {
      widen_groups<Halves>(terms.minimum, first, rows, groups, scratch);
      for (std::size_t i = 0; i < count; ++i) shift[i] -= scratch[i];
    }
    if (terms.factor != 1.0f) {
      for (std::size_t i = 0; i < count; ++i) shift[i] *= terms.factor;
    }
  }
  if (terms.factor == 1.0f) return;
  for (std::size_t i = 0; i < count; ++i) scale[i] *= terms.factor;
}

}  // namespace
}  // namespace entrollm
