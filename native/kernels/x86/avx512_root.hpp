// Decodes the root of a block from the dense layout. Fields are read eight vectors (512 weights) at
// a time, an *eight*: the layout repeats itself every eight vectors, so that shifts and offsets are
// constants. A step is one vector of an eight.
#pragma once

#include <utility>

#include "kernels/x86/avx512_vectors.hpp"

namespace entrollm {
namespace {

using EightSteps = std::make_integer_sequence<int, 8>;

// Calls step.operator()<Step>(eight) for the eight steps.
template <class StepBody, int... Step>
[[gnu::always_inline]] inline void for_steps(std::size_t eight, StepBody& step,
                                             std::integer_sequence<int, Step...>) {
  (step.template operator()<Step>(eight), ...);
}

// The same for the first `count` of them.
template <class StepBody, int... Step>
[[gnu::always_inline]] inline void for_some_steps(std::size_t eight, std::size_t count,
                                                  StepBody& step,
                                                  std::integer_sequence<int, Step...>) {
  ((count > Step ? step.template operator()<Step>(eight) : void()), ...);
}

// Calls step.operator()<Step>(eight) for vectors 8 * eight + Step below `vectors`.
template <class StepBody>
void for_vectors(std::size_t vectors, StepBody&& step) {
  std::size_t eight = 0;
  for (; eight < vectors / 8; ++eight) for_steps(eight, step, EightSteps());
  for_some_steps(eight, vectors % 8, step, std::make_integer_sequence<int, 7>());
}

// The bit matrix that moves `width` bits from bit `from` to bit `to` of every byte and clears the
// rest. One affine transform replaces a shift and a mask.
constexpr std::uint64_t move_bits(int from, int width, int to) {
  std::uint64_t matrix = 0;
  for (int bit = 0; bit < width; ++bit) {
    // Byte 7 - i of the matrix selects the source bit of result bit i.
    matrix |= std::uint64_t{1} << ((7 - (to + bit)) * 8 + from + bit);
  }
  return matrix;
}

template <std::uint64_t Matrix>
inline __m512i transform(__m512i value) {
  return _mm512_gf2p8affine_epi64_epi8(value, _mm512_set1_epi64(static_cast<long long>(Matrix)), 0);
}

// The dense fields of a block. The last eight may be read past the block's fields, which the slack
// allows.
template <int Bits>
struct EightReader {
  static constexpr int kFours = (Bits & 4) != 0 ? 1 : 0;
  static constexpr int kTwos = (Bits & 2) != 0 ? 1 : 0;
  static constexpr int kOnes = (Bits & 1) != 0 ? 1 : 0;

  const std::uint8_t* fours;
  const std::uint8_t* twos;
  const std::uint8_t* ones;

  EightReader(const std::uint8_t* fields, std::size_t count)
      : fours(fields),
        twos(fours + (kFours != 0 ? dense_bytes(count, 4) : 0)),
        ones(twos + (kTwos != 0 ? dense_bytes(count, 2) : 0)) {}

  // The fields of vector 8 * eight + Step.
  template <int Step>
  __m512i read(std::size_t eight) const {
    __m512i value = _mm512_setzero_si512();
    if constexpr (kFours != 0) {
      const __m512i packed = load(fours + eight * 4 * kVector + Step / 2 * kVector);
      value = transform<move_bits(Step % 2 * 4, 4, 2 * kTwos + kOnes)>(packed);
    }
    if constexpr (kTwos != 0) {
      const __m512i packed = load(twos + eight * 2 * kVector + Step / 4 * kVector);
      const __m512i two = transform<move_bits(Step % 4 * 2, 2, kOnes)>(packed);
      value = kFours != 0 ? _mm512_or_si512(value, two) : two;
    }
    if constexpr (kOnes != 0) {
      const __mmask64 one = load_word(ones + eight * kVector + Step * 8);
      value = Bits == 1 ? _mm512_maskz_set1_epi8(one, 1)
                        : _mm512_mask_add_epi8(value, one, value, _mm512_set1_epi8(1));
    }
    return value;
  }
};

// Merges the low bits of a block into its symbols. A code with Low == 0 has none.
template <int Low>
struct LowReader {
  EightReader<Low> reader;
  LowReader(const std::uint8_t* fields, std::size_t count) : reader(fields, count) {}
  template <int Step>
  __m512i merge(__m512i symbols, std::size_t eight) const {
    return _mm512_or_si512(symbols, reader.template read<Step>(eight));
  }
};
template <>
struct LowReader<0> {
  LowReader(const std::uint8_t*, std::size_t) {}
  template <int Step>
  __m512i merge(__m512i symbols, std::size_t) const {
    return symbols;
  }
};

// The root's symbols, vector by vector: dense field, table look-up, escapes, low bits.
template <int Bits, bool Escape, int Low>
struct RootDecoder {
  EightReader<Bits> fields;
  LowReader<Low> low;
  Avx512Vectors::Table<Bits, Escape> table;
  const std::uint8_t* child;
  std::size_t escapes = 0;

  RootDecoder(const FieldArgs& args, const std::uint8_t* low_fields)
      : fields(args.fields, args.count),
        low(low_fields, args.count),
        table(args.table),
        child(args.child) {}

  template <int Step>
  __m512i next(std::size_t eight) {
    __m512i symbols;
    __mmask64 mask = 0;
    if constexpr (Bits == 1 && Escape) {
      mask = load_word(fields.ones + eight * kVector + Step * 8);
      symbols = table.at_bit(mask);
    } else {
      const __m512i field = fields.template read<Step>(eight);
      symbols = table.at(field);
      if constexpr (Escape) {
        mask = _mm512_cmpeq_epi8_mask(field, _mm512_set1_epi8((1 << Bits) - 1));
      }
    }
    if constexpr (Escape) {
      symbols = expand(symbols, mask, child + escapes);
      escapes += popcount(mask);
    }
    return low.template merge<Step>(symbols, eight);
  }
};

}  // namespace
}  // namespace entrollm
