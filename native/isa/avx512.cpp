// AVX-512 kernels (VBMI, VBMI2, VNNI): 64 symbols a step, escapes merged with one VPEXPANDB.
// Everything here has internal linkage: code compiled for AVX-512 must not be shared by the linker.
#include <immintrin.h>

#include "isa/kernels.hpp"

namespace entrollm {
namespace {

__m512i load(const void* p) { return _mm512_loadu_si512(p); }
void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }

__mmask64 load_mask(const std::uint8_t* p) {
  std::uint64_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

std::uint64_t below(std::size_t count) {
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

std::size_t popcount(std::uint64_t word) { return static_cast<std::size_t>(_mm_popcnt_u64(word)); }

template <int Bits, bool Escape>
std::size_t sparse_field_of(const FieldArgs& args, std::uint8_t* out) {
  const std::size_t plane_bytes = (args.count + 7) / 8;
  const __m512i table = load(args.table);
  std::size_t escapes = 0;
  for (std::size_t i = 0; i < args.count; i += kVector) {
    const std::uint8_t* plane = args.fields + i / 8;
    __mmask64 all = load_mask(plane);
    __m512i field = _mm512_maskz_set1_epi8(all, 1);
    for (int bit = 1; bit < Bits; ++bit) {
      const __mmask64 mask = load_mask(plane + static_cast<std::size_t>(bit) * plane_bytes);
      field =
          _mm512_mask_add_epi8(field, mask, field, _mm512_set1_epi8(static_cast<char>(1 << bit)));
      all &= mask;
    }
    __m512i symbols = _mm512_permutexvar_epi8(field, table);
    if constexpr (Escape) {
      symbols = _mm512_mask_expand_epi8(symbols, all, load(args.child + escapes));
      escapes += popcount(all & below(args.count - i));
    }
    store(out + i, symbols);
  }
  return escapes;
}

std::size_t copy_bytes(const FieldArgs& args, std::uint8_t* out) {
  for (std::size_t i = 0; i < args.count; i += kVector) store(out + i, load(args.fields + i));
  return 0;
}

std::size_t sparse_field(const FieldArgs& args, std::uint8_t* out) {
  const bool escape = args.child != nullptr;
  switch (args.bits) {
    case 1:
      return escape ? sparse_field_of<1, true>(args, out) : sparse_field_of<1, false>(args, out);
    case 2:
      return escape ? sparse_field_of<2, true>(args, out) : sparse_field_of<2, false>(args, out);
    case 3:
      return escape ? sparse_field_of<3, true>(args, out) : sparse_field_of<3, false>(args, out);
    case 4:
      return escape ? sparse_field_of<4, true>(args, out) : sparse_field_of<4, false>(args, out);
    case 5:
      return escape ? sparse_field_of<5, true>(args, out) : sparse_field_of<5, false>(args, out);
    case 6:
      return escape ? sparse_field_of<6, true>(args, out) : sparse_field_of<6, false>(args, out);
    default:
      return copy_bytes(args, out);
  }
}

// The dense fields of one vector: up to three packed groups, read in step.
template <int Bits>
struct DenseReader {
  const std::uint8_t* fours;
  const std::uint8_t* twos;
  const std::uint8_t* ones;

  DenseReader(const std::uint8_t* fields, std::size_t count)
      : fours(fields),
        twos(fours + ((Bits & 4) != 0 ? dense_bytes(count, 4) : 0)),
        ones(twos + ((Bits & 2) != 0 ? dense_bytes(count, 2) : 0)) {}

  // `vector` counts vectors of 64 symbols. One affine transform per group shifts and masks.
  __m512i read(std::size_t vector) const {
    __m512i value = _mm512_setzero_si512();
    if constexpr ((Bits & 4) != 0) {
      const __m512i group = load(fours + vector / 2 * kVector);
      const auto shift = static_cast<unsigned>(vector % 2 * 4);
      value = _mm512_and_si512(_mm512_srli_epi16(group, shift), _mm512_set1_epi8(15));
      if constexpr ((Bits & 3) != 0)
        value = _mm512_slli_epi16(value, Bits & 3 ? (Bits & 3) / 2 + 1 : 0);
    }
    if constexpr ((Bits & 2) != 0) {
      const __m512i group = load(twos + vector / 4 * kVector);
      const auto shift = static_cast<unsigned>(vector % 4 * 2);
      __m512i two = _mm512_and_si512(_mm512_srli_epi16(group, shift), _mm512_set1_epi8(3));
      if constexpr ((Bits & 1) != 0) two = _mm512_add_epi8(two, two);
      value = _mm512_or_si512(value, two);
    }
    if constexpr ((Bits & 1) != 0) {
      const __mmask64 one = load_mask(ones + vector * 8);
      value = _mm512_mask_add_epi8(value, one, value, _mm512_set1_epi8(1));
    }
    return value;
  }
};

template <int Bits, bool Escape>
std::size_t dense_field_of(const FieldArgs& args, std::uint8_t* out) {
  const DenseReader<Bits> reader(args.fields, args.count);
  const __m512i table = load(args.table);
  const __m512i escape = _mm512_set1_epi8((1 << Bits) - 1);
  std::size_t escapes = 0;
  for (std::size_t vector = 0; vector < args.count / kVector; ++vector) {
    const __m512i field = reader.read(vector);
    __m512i symbols = _mm512_permutexvar_epi8(field, table);
    if constexpr (Escape) {
      const __mmask64 mask = _mm512_cmpeq_epi8_mask(field, escape);
      symbols = _mm512_mask_expand_epi8(symbols, mask, load(args.child + escapes));
      escapes += popcount(mask);
    }
    store(out + vector * kVector, symbols);
  }
  return escapes;
}

std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  const bool escape = args.child != nullptr;
  switch (args.bits) {
    case 1:
      return escape ? sparse_field_of<1, true>(args, out) : sparse_field_of<1, false>(args, out);
    case 2:
      return escape ? dense_field_of<2, true>(args, out) : dense_field_of<2, false>(args, out);
    case 3:
      return escape ? dense_field_of<3, true>(args, out) : dense_field_of<3, false>(args, out);
    case 4:
      return escape ? dense_field_of<4, true>(args, out) : dense_field_of<4, false>(args, out);
    case 5:
      return escape ? dense_field_of<5, true>(args, out) : dense_field_of<5, false>(args, out);
    case 6:
      return escape ? dense_field_of<6, true>(args, out) : dense_field_of<6, false>(args, out);
    default:
      return copy_bytes(args, out);
  }
}

void split(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
           const std::uint8_t* right, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; i += kVector) {
    const __mmask64 mask = load_mask(plane + i / 8);
    const __m512i lefts = _mm512_maskz_expand_epi8(~mask, load(left));
    store(out + i, _mm512_mask_expand_epi8(lefts, mask, load(right)));
    const std::size_t taken = popcount(mask);
    right += taken;
    left += kVector - taken;
  }
}

template <int Bits>
void or_low_bits_of(const std::uint8_t* fields, std::size_t count, std::uint8_t* out) {
  const DenseReader<Bits> reader(fields, count);
  for (std::size_t vector = 0; vector < count / kVector; ++vector) {
    std::uint8_t* at = out + vector * kVector;
    store(at, _mm512_or_si512(load(at), reader.read(vector)));
  }
}

void or_low_bits(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out) {
  switch (bits) {
    case 1:
      return or_low_bits_of<1>(fields, count, out);
    case 2:
      return or_low_bits_of<2>(fields, count, out);
    case 3:
      return or_low_bits_of<3>(fields, count, out);
    case 4:
      return or_low_bits_of<4>(fields, count, out);
    case 5:
      return or_low_bits_of<5>(fields, count, out);
    default:
      return or_low_bits_of<6>(fields, count, out);
  }
}

std::size_t count_all_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  const std::size_t plane_bytes = (count + 7) / 8;
  std::size_t total = 0;
  std::size_t i = 0;
  if (count >= 512) {
    __m512i counts = _mm512_setzero_si512();
    for (; i + 512 <= count; i += 512) {
      __m512i ones = load(planes + i / 8);
      for (int bit = 1; bit < bits; ++bit) {
        ones = _mm512_and_si512(ones,
                                load(planes + static_cast<std::size_t>(bit) * plane_bytes + i / 8));
      }
      counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(ones));
    }
    total = static_cast<std::size_t>(_mm512_reduce_add_epi64(counts));
  }
  for (; i < count; i += kVector) {
    std::uint64_t ones = below(count - i);
    for (int bit = 0; bit < bits; ++bit) {
      ones &= load_mask(planes + static_cast<std::size_t>(bit) * plane_bytes + i / 8);
    }
    total += popcount(ones);
  }
  return total;
}

// 256 * high + low summed over lanes. 64 vectors keep each lane below 64 * 4 * 255 * 32896 < 2^31.
std::int64_t reduce(__m512i high, __m512i low) {
  const __m512i lanes = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  const __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)),
                                        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1)));
  return _mm512_reduce_add_epi64(wide);
}

std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  __m512i high = _mm512_setzero_si512();
  __m512i low = _mm512_setzero_si512();
  for (std::size_t i = 0; i < count; i += kVector) {
    const __m512i w = load(weights + i);
    high = _mm512_dpbusd_epi32(high, w, load(x.high + i));
    low = _mm512_dpbusd_epi32(low, w, load(x.low + i));
  }
  return reduce(high, low);
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  __m512i high[kColumnTile];
  __m512i low[kColumnTile];
  for (std::size_t column = 0; column < kColumnTile; ++column) {
    high[column] = low[column] = _mm512_setzero_si512();
  }
  for (std::size_t i = 0; i < count; i += kVector) {
    const __m512i w = load(weights + i);
    for (std::size_t column = 0; column < kColumnTile; ++column) {
      high[column] = _mm512_dpbusd_epi32(high[column], w, load(x[column].high + i));
      low[column] = _mm512_dpbusd_epi32(low[column], w, load(x[column].low + i));
    }
  }
  for (std::size_t column = 0; column < kColumnTile; ++column) {
    out[column] = reduce(high[column], low[column]);
  }
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512",    sparse_field,   dense_field, split,
                                or_low_bits, count_all_ones, dot,         dot_tile};

}  // namespace entrollm
