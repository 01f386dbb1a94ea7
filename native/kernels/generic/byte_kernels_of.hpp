// The kernels that decode lists, written once over the vectors of an instruction set.
//
// A vector of kVector symbols is processed as V::kParts parts. V is a class without data, such as
// Avx2Vectors; scalar.cpp says what the kernels compute, and this is what they need of V:
//
//   Part, kParts, kPartBytes    some symbols, the number of them in a vector, and their size
//   load(p), store(p, parts)    loads one part; stores all parts of a vector
//   Mask, both(a, b)            for each symbol of a part, whether it is marked; marked in both
//   Plane, load_plane(p)        kVector bits, one for each symbol of a vector
//   BitSpreader().mask(plane, part)   the Mask of those symbols whose bit is set
//   fields_of(masks)            symbols whose bit i is set where masks[i] marks them
//   Table<Bits, Escape>         a look-up table: at(fields), and at_bit(mask) if Bits is 1. With an
//                               escape, its last entry has no meaning
//   Flags                       a bit for each symbol of a vector, in whatever form is at hand
//   all_of(planes)              the Flags of those symbols whose bit is set in every plane
//   flags_of(masks)             the Flags of those symbols that the Masks of all parts mark
//   Merge(flags, masks)         the marked symbols, and the list from which they are taken:
//     count(), word()           how many they are; their 64 bits
//     into(symbols, part, next) `symbols`, which come from a Table with an escape, with the
//                               marked ones replaced by the list's, which continues at `next`
//     between(left, right, part)   the marked symbols from one list and the others from another
//   count_ones(word)            of 64 bits
//   OnesCounter                 counts in kBits bits at a time; see count_all_ones_of()
//
// Instruction sets that read the dense layout by DenseReader also have
//
//   kHoldsPacked                whether there are registers enough to hold packed vectors
//   field<Width, Index>(part)   field number Index of Width bits in each byte
//   bit(mask)                   1 where marked, else 0
//   append<Width>(high, low)    high << Width | low
//   append_bit(high, mask)      high << 1 | bit(mask)
//   either(a, b)                a | b
//   equal(part, value)          a Mask
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/layout.hpp"
#include "kernels/generic/dense_reader_of.hpp"
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

template <class V, int Bits, bool Escape>
std::size_t dense_field_of(const FieldArgs& args, std::uint8_t* out) {
  DenseReader<V, Bits> reader(args.fields, args.count);
  const typename V::template Table<Bits, Escape> table(args.table);
  const std::uint8_t* child = args.child;
  for_each_vector(args.count, [&]<int Step>() __attribute__((always_inline)) {
    typename V::Part symbols[V::kParts];
    typename V::Mask escapes[V::kParts];
    reader.template next<Step>(symbols);
    for (std::size_t part = 0; part < V::kParts; ++part) {
      escapes[part] = V::equal(symbols[part], (1 << Bits) - 1);
      symbols[part] = table.at(symbols[part]);
    }
    if constexpr (Escape) {
      const typename V::Merge merge(V::flags_of(escapes), escapes);
      for (std::size_t part = 0; part < V::kParts; ++part) {
        symbols[part] = merge.into(symbols[part], part, child);
      }
      child += merge.count();
    }
    V::store(out, symbols);
    out += kVector;
  });
  return static_cast<std::size_t>(child - args.child);
}

inline std::size_t copy_raw_fields(const FieldArgs& args, std::uint8_t* out) {
  __builtin_memcpy(out, args.fields, args.count);
  return 0;
}

template <class V>
std::size_t sparse_field(const FieldArgs& args, std::uint8_t* out) {
  if (args.bits == kRawBits) return copy_raw_fields(args, out);
  const auto decode =
      args.child != nullptr
          ? instantiation<1, kMaxFieldBits>(
                args.bits, []<int Bits>() { return &sparse_field_of<V, Bits, true>; })
          : instantiation<1, kMaxFieldBits>(
                args.bits, []<int Bits>() { return &sparse_field_of<V, Bits, false>; });
  return decode(args, out);
}

// Fields of one bit look the same in both layouts.
template <class V, int Bits, bool Escape>
constexpr auto dense_field_for() {
  if constexpr (Bits == 1) return &sparse_field_of<V, Bits, Escape>;
  if constexpr (Bits != 1) return &dense_field_of<V, Bits, Escape>;
}

template <class V>
std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  if (args.bits == kRawBits) return copy_raw_fields(args, out);
  const auto decode =
      args.child != nullptr
          ? instantiation<1, kMaxFieldBits>(
                args.bits, []<int Bits>() { return dense_field_for<V, Bits, true>(); })
          : instantiation<1, kMaxFieldBits>(
                args.bits, []<int Bits>() { return dense_field_for<V, Bits, false>(); });
  return decode(args, out);
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
void or_low_bits_of(const std::uint8_t* fields, std::size_t count, std::uint8_t* out) {
  DenseReader<V, Bits> reader(fields, count);
  for_each_vector(count, [&]<int Step>() __attribute__((always_inline)) {
    typename V::Part symbols[V::kParts];
    reader.template next<Step>(symbols);
    for (std::size_t part = 0; part < V::kParts; ++part) {
      symbols[part] = V::either(symbols[part], V::load(out + part * V::kPartBytes));
    }
    V::store(out, symbols);
    out += kVector;
  });
}

template <class V>
void or_low_bits(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out) {
  instantiation<1, kMaxLowBits>(bits, []<int Bits>() { return &or_low_bits_of<V, Bits>; })(
      fields, count, out);
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
