// The kernels of fields in the dense layout, written once over the vectors of an instruction set.
// They need of V what sparse_kernels_of.hpp lists, and
//
//   kPartBytes, load(p)         the size of a part; loads one
//   kHoldsPacked                whether there are registers enough to hold packed vectors
//   field<Width, Index>(part)   field number Index of Width bits in each byte
//   bit(mask)                   1 where marked, else 0
//   append<Width>(high, low)    high << Width | low
//   append_bit(high, mask)      high << 1 | bit(mask)
//   either(a, b)                a | b
//   equal(part, value)          the Mask of the symbols that are `value`
//   flags_of(masks)             the Flags of the symbols that the Masks of all parts mark
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/layout.hpp"
#include "kernels/generic/instantiations.hpp"
#include "kernels/generic/sparse_kernels_of.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {  // every instruction set compiles its own

// Fields of Width bits, 4 or 2, which lie in packed vectors: each serves 8 / Width vectors of
// symbols. `Step` is the number of such a vector modulo 4, so that every shift is a constant.
template <class V, int Width>
class PackedFields {
 public:
  using Part = typename V::Part;

  explicit PackedFields(const std::uint8_t* fields) : at_(fields) {}

  template <int Step>
  void begin() {
    if constexpr (V::kHoldsPacked && Step % kShared == 0) {
      for (std::size_t part = 0; part < V::kParts; ++part) held_[part] = load(part);
    }
  }

  template <int Step>
  Part field(std::size_t part) const {
    return V::template field<Width, Step % kShared>(V::kHoldsPacked ? held_[part] : load(part));
  }

  template <int Step>
  void end() {
    if constexpr (Step % kShared == kShared - 1) at_ += kVector;
  }

 private:
  static constexpr int kShared = 8 / Width;

  Part load(std::size_t part) const { return V::load(at_ + part * V::kPartBytes); }

  const std::uint8_t* at_;
  Part held_[V::kParts];  // the packed vector at `at_`, if V has registers enough to hold it
};

// The dense fields of a block, read vector by vector.
template <class V, int Bits>
class DenseReader {
 public:
  // `count` fields, a multiple of kVector.
  DenseReader(const std::uint8_t* fields, std::size_t count)
      : fours_(fields),
        twos_(fields + (kHasFours ? dense_bytes(count, 4) : 0)),
        ones_(fields + dense_bytes(count, Bits & 6)) {}

  // The next vector of fields. `Step` is its number modulo 4.
  template <int Step>
  [[gnu::always_inline]] inline void next(typename V::Part (&fields)[V::kParts]) {
    if constexpr (kHasFours) fours_.template begin<Step>();
    if constexpr (kHasTwos) twos_.template begin<Step>();
    typename V::Plane ones{};
    if constexpr (kHasOnes) ones = V::load_plane(ones_);
    for (std::size_t part = 0; part < V::kParts; ++part) {
      fields[part] = field<Step>(ones, part);
    }
    if constexpr (kHasFours) fours_.template end<Step>();
    if constexpr (kHasTwos) twos_.template end<Step>();
    if constexpr (kHasOnes) ones_ += kVector / 8;
  }

 private:
  static constexpr bool kHasFours = (Bits & 4) != 0;
  static constexpr bool kHasTwos = (Bits & 2) != 0;
  static constexpr bool kHasOnes = (Bits & 1) != 0;

  template <int Step>
  [[gnu::always_inline]] inline typename V::Part field(const typename V::Plane& ones,
                                                       std::size_t part) const {
    if constexpr (Bits == 1) return V::bit(spreader_.mask(ones, part));
    if constexpr (kHasFours && kHasTwos) {
      return V::template append<2>(fours_.template field<Step>(part),
                                   twos_.template field<Step>(part));
    } else if constexpr (Bits > 1) {
      typename V::Part high;
      if constexpr (kHasFours) high = fours_.template field<Step>(part);
      if constexpr (kHasTwos) high = twos_.template field<Step>(part);
      if constexpr (kHasOnes) high = V::append_bit(high, spreader_.mask(ones, part));
      return high;
    }
  }

  static_assert(Bits >= 1 && Bits <= kMaxFieldBits, "seven bits would need a third append");

  PackedFields<V, 4> fours_;
  PackedFields<V, 2> twos_;
  const std::uint8_t* ones_;
  typename V::BitSpreader spreader_;
};

// Calls step.operator()<Step>() for each vector of `count` symbols, Step being its number modulo 4.
template <class Body>
[[gnu::always_inline]] inline void for_each_vector(std::size_t count, Body step) {
  std::size_t left = count / kVector;
  for (; left >= 4; left -= 4) {
    step.template operator()<0>();
    step.template operator()<1>();
    step.template operator()<2>();
    step.template operator()<3>();
  }
  if (left > 0) step.template operator()<0>();
  if (left > 1) step.template operator()<1>();
  if (left > 2) step.template operator()<2>();
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

template <class V>
std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  return decode_fields(
      args,
      []<int Bits, bool Escape>() {
        // Fields of one bit look the same in both layouts.
        return Bits == 1 ? &sparse_field_of<V, Bits, Escape> : &dense_field_of<V, Bits, Escape>;
      },
      out);
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

}  // namespace
}  // namespace entrollm
