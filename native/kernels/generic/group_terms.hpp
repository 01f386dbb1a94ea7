// The scales and shifts of a row's groups, from the types in which they are stored. Loops that
// compilers turn into vectors; internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <bit>

#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

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

template <WidenHalves Halves>
void widen_groups(const GroupArray& array, std::size_t row, std::size_t groups, float* out) {
  widen_elements<Halves>(array.values, array.type, row * groups, groups, out);
  if (array.supers == nullptr) return;
  const std::size_t supers = (groups + array.ratio - 1) / array.ratio;
  constexpr std::size_t kSome = 64;
  float some[kSome];
  for (std::size_t first = 0; first < supers; first += kSome) {
    const std::size_t count = supers - first < kSome ? supers - first : kSome;
    widen_elements<Halves>(array.supers, array.super_type, row * supers + first, count, some);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t begin = (first + i) * array.ratio;
      const std::size_t end = begin + array.ratio < groups ? begin + array.ratio : groups;
      for (std::size_t group = begin; group < end; ++group) out[group] *= some[i];
    }
  }
}

template <WidenHalves Halves>
void write_group_terms(const GroupTerms& terms, std::size_t row, float* scale, float* shift,
                       float* scratch) {
  const std::size_t groups = terms.groups;
  widen_groups<Halves>(terms.scale, row, groups, scale);
  if (terms.has_shift()) {
    if (terms.zero.values != nullptr) {
      widen_groups<Halves>(terms.zero, row, groups, shift);
      for (std::size_t i = 0; i < groups; ++i) shift[i] = scale[i] * -shift[i];
    } else {
      for (std::size_t i = 0; i < groups; ++i) shift[i] = scale[i] * -terms.zero_of_all;
    }
    if (terms.minimum.values != nullptr) {
      widen_groups<Halves>(terms.minimum, row, groups, scratch);
      for (std::size_t i = 0; i < groups; ++i) shift[i] -= scratch[i];
    }
    for (std::size_t i = 0; i < groups; ++i) shift[i] *= terms.factor;
  }
  for (std::size_t i = 0; i < groups; ++i) scale[i] *= terms.factor;
}

}  // namespace
}  // namespace entrollm
