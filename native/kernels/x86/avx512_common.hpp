// Helpers shared by the AVX-512 kernels. Everything has internal linkage: code compiled for AVX-512
// must not be shared by the linker with code for lesser processors.
#pragma once

#include <immintrin.h>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

inline __mmask64 load_mask(const std::uint8_t* p) {
  std::uint64_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// Keeps the compiler from repeating a load as the memory operand of every use.
inline void keep_in_register(__m512i& v) { asm("" : "+v"(v)); }

// Merges the next bytes at `p` into `v` where `mask` is set. The source goes through a register:
// with a memory operand the expansion is slow on some processors.
inline __m512i expand(__m512i v, __mmask64 mask, const std::uint8_t* p) {
  __m512i source = load(p);
  keep_in_register(source);
  return _mm512_mask_expand_epi8(v, mask, source);
}

// Adds the products of unsigned weights with signed digits to `sums`. GCC 12 copies accumulators of
// the intrinsic around in loops, which costs more than the products.
inline void add_products(__m512i& sums, __m512i weights, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "vm"(digits));
}

inline std::uint64_t below(std::size_t count) {
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

inline std::size_t popcount(std::uint64_t word) {
  return static_cast<std::size_t>(_mm_popcnt_u64(word));
}

// The bit matrix that moves `width` bits from bit `from` to bit `to` of every byte and clears the
// rest; one affine transform in place of a shift and a mask.
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

// The dense fields of a block, read eight vectors (512 weights) at a time so that every shift is a
// constant. The last step may read past the block's fields, which the slack allows.
template <int Bits>
struct DenseReader {
  static constexpr int kFours = (Bits & 4) != 0 ? 1 : 0;
  static constexpr int kTwos = (Bits & 2) != 0 ? 1 : 0;
  static constexpr int kOnes = (Bits & 1) != 0 ? 1 : 0;

  const std::uint8_t* fours;
  const std::uint8_t* twos;
  const std::uint8_t* ones;

  DenseReader(const std::uint8_t* fields, std::size_t count)
      : fours(fields),
        twos(fours + (kFours != 0 ? dense_bytes(count, 4) : 0)),
        ones(twos + (kTwos != 0 ? dense_bytes(count, 2) : 0)) {}

  // Vector 8 * eight + Step: fields repeat their layout every eight vectors, so offsets are
  // constants.
  template <int Step>
  __m512i read(std::size_t eight) const {
    __m512i value = _mm512_setzero_si512();
    if constexpr (kFours != 0) {
      const __m512i group = load(fours + eight * 4 * kVector + Step / 2 * kVector);
      value = transform<move_bits(Step % 2 * 4, 4, 2 * kTwos + kOnes)>(group);
    }
    if constexpr (kTwos != 0) {
      const __m512i group = load(twos + eight * 2 * kVector + Step / 4 * kVector);
      const __m512i two = transform<move_bits(Step % 4 * 2, 2, kOnes)>(group);
      value = kFours != 0 ? _mm512_or_si512(value, two) : two;
    }
    if constexpr (kOnes != 0) {
      const __mmask64 one = load_mask(ones + eight * kVector + Step * 8);
      value = Bits == 1 ? _mm512_maskz_set1_epi8(one, 1)
                        : _mm512_mask_add_epi8(value, one, value, _mm512_set1_epi8(1));
    }
    return value;
  }
};

template <int Bits, bool Escape>
std::size_t sparse_field_of(const FieldArgs& args, std::uint8_t* out) {
  const std::size_t plane_bytes = (args.count + 7) / 8;
  const __m512i table = load(args.table);
  const __m512i first = _mm512_set1_epi8(static_cast<char>(args.table[0]));
  std::size_t escapes = 0;
  for (std::size_t i = 0; i < args.count; i += kVector) {
    const std::uint8_t* plane = args.fields + i / 8;
    __mmask64 all = load_mask(plane);
    __m512i symbols = first;
    if constexpr (Bits > 1 || !Escape) {
      __m512i field = _mm512_maskz_set1_epi8(all, 1);
      for (int bit = 1; bit < Bits; ++bit) {
        const __mmask64 mask = load_mask(plane + static_cast<std::size_t>(bit) * plane_bytes);
        field =
            _mm512_mask_add_epi8(field, mask, field, _mm512_set1_epi8(static_cast<char>(1 << bit)));
        all &= mask;
      }
      symbols = _mm512_permutexvar_epi8(field, table);
    }
    if constexpr (Escape) {
      symbols = expand(symbols, all, args.child + escapes);
      escapes += popcount(all & below(args.count - i));
    }
    store(out + i, symbols);
  }
  return escapes;
}

inline std::size_t copy_bytes(const FieldArgs& args, std::uint8_t* out) {
  for (std::size_t i = 0; i < args.count; i += kVector) store(out + i, load(args.fields + i));
  return 0;
}

template <bool Escape>
std::size_t sparse_field_with(const FieldArgs& args, std::uint8_t* out) {
  switch (args.bits) {
    case 1:
      return sparse_field_of<1, Escape>(args, out);
    case 2:
      return sparse_field_of<2, Escape>(args, out);
    case 3:
      return sparse_field_of<3, Escape>(args, out);
    case 4:
      return sparse_field_of<4, Escape>(args, out);
    case 5:
      return sparse_field_of<5, Escape>(args, out);
    case 6:
      return sparse_field_of<6, Escape>(args, out);
    default:
      return copy_bytes(args, out);
  }
}

inline std::size_t sparse_field_any(const FieldArgs& args, std::uint8_t* out) {
  return args.child != nullptr ? sparse_field_with<true>(args, out)
                               : sparse_field_with<false>(args, out);
}

// Bits at and after a byte boundary: 64 bytes of ones, then of zeros.
struct ByteMasks {
  std::uint8_t bytes[128];
  constexpr ByteMasks() : bytes{} {
    for (int i = 0; i < 64; ++i) bytes[i] = 0xff;
  }
};
inline constexpr ByteMasks kByteMasks;

inline std::size_t count_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  const std::size_t plane_bytes = (count + 7) / 8;
  const auto plane = [&](int bit, std::size_t byte) {
    return planes + static_cast<std::size_t>(bit) * plane_bytes + byte;
  };
  const auto all_ones = [&](std::size_t byte) {
    __m512i ones = load(plane(0, byte));
    for (int bit = 1; bit < bits; ++bit) ones = _mm512_and_si512(ones, load(plane(bit, byte)));
    return ones;
  };
  const std::size_t whole = count / 8;
  __m512i counts = _mm512_setzero_si512();
  std::size_t byte = 0;
  for (; byte + 64 <= whole; byte += 64) {
    counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(all_ones(byte)));
  }
  // The rest without a branch: short lists differ in length from block to block.
  const __m512i rest =
      _mm512_and_si512(all_ones(byte), load(kByteMasks.bytes + 64 - (whole - byte)));
  counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(rest));
  std::uint8_t last = 0xff;
  for (int bit = 0; bit < bits; ++bit) last &= *plane(bit, whole);
  return static_cast<std::size_t>(_mm512_reduce_add_epi64(counts)) +
         popcount(last & ((1u << (count % 8)) - 1));
}

// The low bits of eight vectors; Low == 0 has none.
template <int Low>
struct LowReader {
  DenseReader<Low> reader;
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

// Calls step.template operator()<Step>(eight) for vectors 8 * eight + Step below `vectors`.
template <class StepBody>
void for_vectors(std::size_t vectors, StepBody&& step) {
  std::size_t eight = 0;
  for (; eight < vectors / 8; ++eight) {
    step.template operator()<0>(eight);
    step.template operator()<1>(eight);
    step.template operator()<2>(eight);
    step.template operator()<3>(eight);
    step.template operator()<4>(eight);
    step.template operator()<5>(eight);
    step.template operator()<6>(eight);
    step.template operator()<7>(eight);
  }
  const std::size_t rest = vectors % 8;
  if (rest > 0) step.template operator()<0>(eight);
  if (rest > 1) step.template operator()<1>(eight);
  if (rest > 2) step.template operator()<2>(eight);
  if (rest > 3) step.template operator()<3>(eight);
  if (rest > 4) step.template operator()<4>(eight);
  if (rest > 5) step.template operator()<5>(eight);
  if (rest > 6) step.template operator()<6>(eight);
}

// 256 * high + low summed over lanes. 64 vectors keep each lane below 64 * 4 * 255 * 32896 < 2^31.
inline std::int64_t reduce_digits(__m512i high, __m512i low) {
  const __m512i lanes = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  const __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)),
                                        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1)));
  return _mm512_reduce_add_epi64(wide);
}

// Products of weights with the digits of one activation vector, spread over four pairs of
// accumulators so that they do not wait for each other. Indices are constants throughout, which
// keeps the arrays in registers.
struct DotSums {
  __m512i high[4];
  __m512i low[4];
  DotSums()
      : high{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
             _mm512_setzero_si512()},
        low{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
            _mm512_setzero_si512()} {}
  template <int Step>
  void add(__m512i weights, const Digits& x, std::size_t eight) {
    const std::size_t at = eight * 8 * kVector + Step * kVector;
    add_products(high[Step % 4], weights, load(x.high + at));
    add_products(low[Step % 4], weights, load(x.low + at));
  }
  std::int64_t total() const { return reduce_digits(sum(high), sum(low)); }
  static __m512i sum(const __m512i (&v)[4]) {
    return _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3]));
  }
};

// The root's symbols, vector by vector: dense field, table look-up, escapes, low bits.
template <int Bits, bool Escape, int Low>
struct RootDecoder {
  DenseReader<Bits> fields;
  LowReader<Low> low;
  __m512i table;
  __m512i first;
  const std::uint8_t* child;
  std::size_t escapes = 0;

  RootDecoder(const FieldArgs& args, const std::uint8_t* low_fields)
      : fields(args.fields, args.count),
        low(low_fields, args.count),
        table(load(args.table)),
        first(_mm512_set1_epi8(static_cast<char>(args.table[0]))),
        child(args.child) {}

  template <int Step>
  __m512i next(std::size_t eight) {
    __m512i symbols;
    __mmask64 mask = 0;
    if constexpr (Bits == 1 && Escape) {
      mask = load_mask(fields.ones + eight * kVector + Step * 8);
      symbols = first;
    } else {
      const __m512i field = fields.template read<Step>(eight);
      symbols = _mm512_permutexvar_epi8(field, table);
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
