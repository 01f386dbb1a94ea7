// The kernels of lists in the sparse layout, written once over the vectors of an instruction set.
//
// A vector of kVector symbols is processed as V::kParts parts. V is a class without data, such as
// Avx2Vectors; scalar.cpp says what the kernels compute, and this is what they need of V:
//
//   Part, kParts                some symbols, and the number of such parts in a vector
//   store(p, parts)             stores all parts of a vector
//   Mask, both(a, b)            for each symbol of a part, whether it is marked; marked in both
//   Plane, load_plane(p)        kVector bits, one for each symbol of a vector
//   BitSpreader().mask(plane, part)   the Mask of the symbols whose bit is set
//   fields_of(masks)            symbols whose bit i is set where masks[i] marks them
//   Table<Bits, Escape>         a look-up table: at(fields), and at_bit(mask) if Bits is 1. With an
//                               escape, what it has for the highest field is not used
//   Flags                       a bit for each symbol of a vector, in whatever form is at hand
//   all_of(planes)              the Flags of the symbols whose bit is set in every plane
//   Merge(flags, masks)         takes marked symbols from a list. Flags and the Masks of all parts
//                               mark the same symbols
//     count(), word()           the number of marked symbols; their 64 bits
//     into(symbols, part, next) `symbols`, from a Table with an escape, with the marked ones
//                               replaced by those of the list, which continues at `next`
//     between(left, right, part)   the marked symbols from `right` and the others from `left`
//   count_ones(word)            the number of ones in 64 bits
//   OnesCounter                 counts ones, kBits bits at a time: load(p), add(loaded), total()
//
// An instruction set with a better kernel of its own leaves out what only that kernel needs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/layout.hpp"
#include "kernels/generic/instantiations.hpp"
#include "kernels/generic/words.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {  // every instruction set compiles its own

template <class V, int Bits, bool Escape>
std::size_t sparse_field_of(const FieldArgs& args, std::uint8_t* out) {
  const std::size_t count = args.count;
  const std::size_t plane_bytes = (count + 7) / 8;
  const typename V::BitSpreader spreader;
  const typename V::template Table<Bits, Escape> table(args.table);
  const std::uint8_t* fields = args.fields;
  const std::uint8_t* child = args.child;
  std::uint64_t last = 0;
  for (std::size_t i = 0; i < count; i += kVector, fields += kVector / 8) {
    typename V::Plane planes[Bits];
    for (int bit = 0; bit < Bits; ++bit) {
      planes[bit] = V::load_plane(fields + static_cast<std::size_t>(bit) * plane_bytes);
    }
    typename V::Part symbols[V::kParts];
    typename V::Mask escapes[V::kParts];
    for (std::size_t part = 0; part < V::kParts; ++part) {
      typename V::Mask masks[Bits];
      for (int bit = 0; bit < Bits; ++bit) masks[bit] = spreader.mask(planes[bit], part);
      escapes[part] = masks[0];
      for (int bit = 1; bit < Bits; ++bit) escapes[part] = V::both(escapes[part], masks[bit]);
      if constexpr (Bits == 1) {
        symbols[part] = table.at_bit(masks[0]);
      } else {
        symbols[part] = table.at(V::fields_of(masks));
      }
    }
    if constexpr (Escape) {
      const typename V::Merge merge(V::all_of(planes), escapes);
      for (std::size_t part = 0; part < V::kParts; ++part) {
        symbols[part] = merge.into(symbols[part], part, child);
      }
      child += merge.count();
      last = merge.word();
    }
    V::store(out + i, symbols);
  }
  if constexpr (!Escape) return 0;
  // Bits past the last field may have been taken for escapes.
  const std::uint64_t excess = count % kVector == 0 ? 0 : last & ~below(count % kVector);
  return static_cast<std::size_t>(child - args.child) - V::count_ones(excess);
}

// Decodes fields of any width by the function that Make().operator()<bits, escape>() returns.
template <class Make>
std::size_t decode_fields(const FieldArgs& args, Make, std::uint8_t* out) {
  if (args.bits == kRawBits) {
    __builtin_memcpy(out, args.fields, args.count);
    return 0;
  }
  const auto decode =
      args.child != nullptr
          ? instantiation<1, kMaxFieldBits>(
                args.bits, []<int Bits>() { return Make().template operator()<Bits, true>(); })
          : instantiation<1, kMaxFieldBits>(
                args.bits, []<int Bits>() { return Make().template operator()<Bits, false>(); });
  return decode(args, out);
}

template <class V>
std::size_t sparse_field(const FieldArgs& args, std::uint8_t* out) {
  return decode_fields(
      args, []<int Bits, bool Escape>() { return &sparse_field_of<V, Bits, Escape>; }, out);
}

template <class V>
void split(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
           const std::uint8_t* right, std::uint8_t* out) {
  const typename V::BitSpreader spreader;
  for (std::size_t i = 0; i < count; i += kVector, plane += kVector / 8) {
    const typename V::Plane planes[1] = {V::load_plane(plane)};
    typename V::Mask masks[V::kParts];
    for (std::size_t part = 0; part < V::kParts; ++part) {
      masks[part] = spreader.mask(planes[0], part);
    }
    const typename V::Merge ones(V::all_of(planes), masks);
    typename V::Part symbols[V::kParts];
    for (std::size_t part = 0; part < V::kParts; ++part) {
      symbols[part] = ones.between(left, right, part);
    }
    V::store(out + i, symbols);
    right += ones.count();
    left += kVector - ones.count();
  }
}

template <class V, int Bits>
std::size_t count_all_ones_of(const std::uint8_t* planes, std::size_t count) {
  using Counter = typename V::OnesCounter;
  const std::size_t plane_bytes = (count + 7) / 8;
  const auto all_ones = [&](auto load) {
    auto ones = load(planes);
    for (std::size_t bit = 1; bit < Bits; ++bit) ones = ones & load(planes + bit * plane_bytes);
    return ones;
  };
  Counter counter;
  std::size_t left = count;
  for (; left >= Counter::kBits; left -= Counter::kBits, planes += Counter::kBits / 8) {
    counter.add(all_ones(Counter::load));
  }
  std::size_t total = counter.total();
  static_assert(Counter::kBits <= 2 * kVector, "at most one whole word is left");
  if (Counter::kBits > kVector && left >= kVector) {
    total += V::count_ones(all_ones(load_word));
    left -= kVector;
    planes += kVector / 8;
  }
  return left == 0 ? total : total + V::count_ones(all_ones(load_word) & below(left));
}

template <class V>
std::size_t count_all_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  return instantiation<1, kMaxFieldBits>(
      bits, []<int Bits>() { return &count_all_ones_of<V, Bits>; })(planes, count);
}

}  // namespace
}  // namespace entrollm
