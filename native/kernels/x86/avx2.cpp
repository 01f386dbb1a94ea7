// AVX2 kernels (with BMI2 and POPCNT): 64 symbols a step as two halves of 32, escapes merged 16 at
// a time by a byte shuffle whose indices are prefix counts of the escape mask. A second table
// replaces the products by AVX-VNNI. Everything here has internal linkage: code compiled for AVX2
// must not be shared by the linker.
#include <immintrin.h>

#include "kernels/generic/vector_steps.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kHalf = 32;

__m256i load(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
__m256i load(const std::int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
__m256i load(const std::int16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
__m128i load16(const std::uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
void store(std::uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

std::uint64_t load_bits(const std::uint8_t* p) {
  std::uint64_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

std::size_t popcount(std::uint64_t word) { return static_cast<std::size_t>(_mm_popcnt_u64(word)); }

std::uint64_t below(std::size_t count) {
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

// Byte i is 0xff where bit i of the four bytes at `p` is set.
__m256i mask_of_bits(const std::uint8_t* p) {
  const __m256i spread =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i select = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  std::int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
}

// Minus the number of 0xff bytes of `mask` up to and with each byte, in each lane of 16.
__m256i negative_counts(__m256i mask) {
  const __m256i last_of_low_half =
      _mm256_setr_epi64x(-1, 0x0707070707070707, -1, 0x0707070707070707);
  __m256i counts = _mm256_add_epi8(mask, _mm256_slli_epi64(mask, 8));
  counts = _mm256_add_epi8(counts, _mm256_slli_epi64(counts, 16));
  counts = _mm256_add_epi8(counts, _mm256_slli_epi64(counts, 32));
  return _mm256_add_epi8(counts, _mm256_shuffle_epi8(counts, last_of_low_half));
}

__m256i load_lanes(const std::uint8_t* first, const std::uint8_t* second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(first)), load16(second), 1);
}

// Where `mask` is set, the next bytes of a list: `first` serves the low lane, `second` the high
// one. Zero elsewhere: the shuffle's indices are negative there.
__m256i expand(__m256i mask, __m256i counts, const std::uint8_t* first,
               const std::uint8_t* second) {
  const __m256i last = _mm256_or_si256(mask, _mm256_set1_epi8(static_cast<char>(0x80)));
  return _mm256_shuffle_epi8(load_lanes(first, second), _mm256_sub_epi8(last, counts));
}

// A table of 2^Bits bytes; with an escape, its last entry reads as zero.
template <int Bits, bool Escape>
class Table {
 public:
  explicit Table(const std::uint8_t* entries) {
    alignas(16) std::uint8_t bytes[64];
    __builtin_memcpy(bytes, entries, sizeof bytes);
    if (Escape) bytes[(1 << Bits) - 1] = 0;
    for (int i = kParts - 1; i >= 0; --i) {
      __m128i part = load16(bytes + 16 * i);
      if (i > 0) part = _mm_xor_si128(part, load16(bytes + 16 * (i - 1)));
      parts_[i] = _mm256_broadcastsi128_si256(part);
    }
  }

  // A shuffle yields 0 for negative indices, so every part up to the field's own one adds the
  // difference from the part before it.
  __m256i at(__m256i field) const {
    __m256i symbols = _mm256_shuffle_epi8(parts_[0], field);
    for (int i = 1; i < kParts; ++i) {
      field = _mm256_sub_epi8(field, _mm256_set1_epi8(16));
      symbols = _mm256_xor_si256(symbols, _mm256_shuffle_epi8(parts_[i], field));
    }
    return symbols;
  }

  __m256i first() const { return _mm256_shuffle_epi8(parts_[0], _mm256_setzero_si256()); }

 private:
  static constexpr int kParts = Bits <= 4 ? 1 : 1 << (Bits - 4);
  __m256i parts_[kParts];
};

// How many bits of a vector's mask come before each quarter, and in all.
struct Before {
  std::size_t quarter[5];
  explicit Before(std::uint64_t bits)
      : quarter{0, popcount(bits & 0xffff), popcount(bits & 0xffffffff),
                popcount(bits & 0xffffffffffff), popcount(bits)} {}
};

template <int Bits, bool Escape>
std::size_t sparse_field_of(const FieldArgs& args, std::uint8_t* out) {
  const std::size_t count = args.count;
  const std::size_t plane_bytes = (count + 7) / 8;
  const Table<Bits, Escape> table(args.table);
  const std::uint8_t* plane = args.fields;
  const std::uint8_t* child = args.child;
  std::uint64_t all = 0;
  for (std::size_t i = 0; i < count; i += kVector, plane += kVector / 8) {
    all = load_bits(plane);
    for (int bit = 1; bit < Bits; ++bit) {
      all &= load_bits(plane + static_cast<std::size_t>(bit) * plane_bytes);
    }
    const Before before(all);
    for (std::size_t half = 0; half < 2; ++half) {
      __m256i every = mask_of_bits(plane + half * 4);
      __m256i field = _mm256_and_si256(every, _mm256_set1_epi8(1));
      for (int bit = 1; bit < Bits; ++bit) {
        const __m256i mask =
            mask_of_bits(plane + static_cast<std::size_t>(bit) * plane_bytes + half * 4);
        every = _mm256_and_si256(every, mask);
        field = _mm256_or_si256(
            field, _mm256_and_si256(mask, _mm256_set1_epi8(static_cast<char>(1 << bit))));
      }
      __m256i symbols =
          Bits == 1 && Escape ? _mm256_andnot_si256(every, table.first()) : table.at(field);
      if constexpr (Escape) {
        symbols = _mm256_or_si256(
            symbols, expand(every, negative_counts(every), child + before.quarter[2 * half],
                            child + before.quarter[2 * half + 1]));
      }
      store(out + i + half * kHalf, symbols);
    }
    if constexpr (Escape) child += before.quarter[4];
  }
  if constexpr (!Escape) return 0;
  // The last vector may have counted what lies past the last field.
  const std::size_t tail = count % kVector;
  const std::size_t excess = tail == 0 ? 0 : popcount(all & ~below(tail));
  return static_cast<std::size_t>(child - args.child) - excess;
}

std::size_t copy_bytes(const FieldArgs& args, std::uint8_t* out) {
  for (std::size_t i = 0; i < args.count; i += kHalf) store(out + i, load(args.fields + i));
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

// The dense fields of a block, read vector by vector; `Step` is the vector's number modulo 4, so
// that every shift is a constant.
template <int Bits>
class DenseReader {
 public:
  DenseReader(const std::uint8_t* fields, std::size_t count)
      : fours_(fields),
        twos_(fours_ + ((Bits & 4) != 0 ? dense_bytes(count, 4) : 0)),
        ones_(twos_ + ((Bits & 2) != 0 ? dense_bytes(count, 2) : 0)) {}

  template <int Step>
  __m256i read(std::size_t half) const {
    __m256i value = _mm256_setzero_si256();
    if constexpr ((Bits & 4) != 0) {
      value = part<4, Step % 2>(load(fours_ + half * kHalf));
      if constexpr ((Bits & 3) != 0) value = _mm256_slli_epi16(value, (Bits & 3) / 2 + 1);
    }
    if constexpr ((Bits & 2) != 0) {
      __m256i two = part<2, Step>(load(twos_ + half * kHalf));
      if constexpr ((Bits & 1) != 0) two = _mm256_add_epi8(two, two);
      value = (Bits & 4) != 0 ? _mm256_or_si256(value, two) : two;
    }
    if constexpr ((Bits & 1) != 0) {
      value = _mm256_sub_epi8(value, mask_of_bits(ones_ + half * 4));
    }
    return value;
  }

  // Goes on to the next vector.
  template <int Step>
  void advance() {
    if (Step % 2 == 1) fours_ += kVector;
    if (Step == 3) twos_ += kVector;
    ones_ += kVector / 8;
  }

 private:
  // Field `Index` of `Width` bits of every byte.
  template <int Width, int Index>
  static __m256i part(__m256i group) {
    return _mm256_and_si256(_mm256_srli_epi16(group, Width * Index),
                            _mm256_set1_epi8((1 << Width) - 1));
  }

  const std::uint8_t* fours_;
  const std::uint8_t* twos_;
  const std::uint8_t* ones_;
};

template <int Bits, bool Escape>
struct DenseField {
  DenseReader<Bits> reader;
  Table<Bits, Escape> table;
  const std::uint8_t* child;
  std::uint8_t* out;

  template <int Step>
  [[gnu::always_inline]] inline void step() {
    for (std::size_t half = 0; half < 2; ++half) {
      const __m256i field = reader.template read<Step>(half);
      __m256i symbols = table.at(field);
      if constexpr (Escape) {
        const __m256i mask = _mm256_cmpeq_epi8(field, _mm256_set1_epi8((1 << Bits) - 1));
        const auto bits = static_cast<std::uint32_t>(_mm256_movemask_epi8(mask));
        symbols = _mm256_or_si256(
            symbols, expand(mask, negative_counts(mask), child, child + popcount(bits & 0xffff)));
        child += popcount(bits);
      }
      store(out + half * kHalf, symbols);
    }
    reader.template advance<Step>();
    out += kVector;
  }
};

template <int Bits, bool Escape>
std::size_t dense_field_of(const FieldArgs& args, std::uint8_t* out) {
  DenseField<Bits, Escape> field{
      {args.fields, args.count}, Table<Bits, Escape>(args.table), args.child, out};
  for_each_vector(args.count, field);
  return static_cast<std::size_t>(field.child - args.child);
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
  // In each lane of 16, where the zeros would lie if there were no ones.
  const __m256i position = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0,
                                            1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::size_t i = 0; i < count; i += kVector) {
    const Before before(load_bits(plane + i / 8));
    for (std::size_t half = 0; half < 2; ++half) {
      const std::size_t first = before.quarter[2 * half];
      const std::size_t second = before.quarter[2 * half + 1];
      const std::uint8_t* lefts = left + half * kHalf;
      const __m256i mask = mask_of_bits(plane + i / 8 + half * 4);
      const __m256i counts = negative_counts(mask);
      const __m256i zeros = _mm256_shuffle_epi8(load_lanes(lefts - first, lefts + 16 - second),
                                                _mm256_add_epi8(position, counts));
      const __m256i ones = expand(mask, counts, right + first, right + second);
      store(out + i + half * kHalf, _mm256_or_si256(_mm256_andnot_si256(mask, zeros), ones));
    }
    right += before.quarter[4];
    left += kVector - before.quarter[4];
  }
}

template <int Bits>
struct LowBits {
  DenseReader<Bits> reader;
  std::uint8_t* out;

  template <int Step>
  [[gnu::always_inline]] inline void step() {
    for (std::size_t half = 0; half < 2; ++half) {
      std::uint8_t* at = out + half * kHalf;
      store(at, _mm256_or_si256(load(at), reader.template read<Step>(half)));
    }
    reader.template advance<Step>();
    out += kVector;
  }
};

template <int Bits>
void or_low_bits_of(const std::uint8_t* fields, std::size_t count, std::uint8_t* out) {
  LowBits<Bits> low{{fields, count}, out};
  for_each_vector(count, low);
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

template <int Bits>
std::size_t count_ones_of(const std::uint8_t* planes, std::size_t count) {
  const std::size_t plane_bytes = (count + 7) / 8;
  const auto word = [&](std::size_t i) {
    std::uint64_t ones = load_bits(planes + i / 8);
    for (std::size_t bit = 1; bit < Bits; ++bit)
      ones &= load_bits(planes + bit * plane_bytes + i / 8);
    return ones;
  };
  std::size_t total = 0;
  std::size_t i = 0;
  for (; i + kVector <= count; i += kVector) total += popcount(word(i));
  return i == count ? total : total + popcount(word(i) & below(count - i));
}

std::size_t count_all_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  switch (bits) {
    case 1:
      return count_ones_of<1>(planes, count);
    case 2:
      return count_ones_of<2>(planes, count);
    case 3:
      return count_ones_of<3>(planes, count);
    case 4:
      return count_ones_of<4>(planes, count);
    case 5:
      return count_ones_of<5>(planes, count);
    default:
      return count_ones_of<6>(planes, count);
  }
}

std::int64_t sum_lanes(__m256i lanes) {
  const __m256i sums = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1)));
  const __m128i pairs =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_extract_epi64(pairs, 0) + _mm_extract_epi64(pairs, 1);
}

// VPMADDUBSW would saturate, so that weights and activations are multiplied in 16 bits. 4096
// weights add 256 products to each of 16 lanes: below 256 * 255 * 32768 < 2^31.
template <std::size_t Columns>
void products(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  __m256i sums[Columns][2];
  for (std::size_t column = 0; column < Columns; ++column) {
    sums[column][0] = sums[column][1] = _mm256_setzero_si256();
  }
  for (std::size_t i = 0; i < count; i += kHalf) {
    for (std::size_t part = 0; part < 2; ++part) {
      const std::size_t at = i + part * kHalf / 2;
      const __m256i w = _mm256_cvtepu8_epi16(load16(weights + at));
      for (std::size_t column = 0; column < Columns; ++column) {
        const __m256i pairs = _mm256_madd_epi16(w, load(x[column].whole + at));
        sums[column][part] = _mm256_add_epi32(sums[column][part], pairs);
      }
    }
  }
  for (std::size_t column = 0; column < Columns; ++column) {
    out[column] = sum_lanes(sums[column][0]) + sum_lanes(sums[column][1]);
  }
}

std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  std::int64_t sum;
  products<1>(weights, &x, count, &sum);
  return sum;
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  products<kColumnTile>(weights, x, count, out);
}

#define ENTROLLM_AVX_VNNI __attribute__((target("avxvnni")))

// Two sums a digit, so that a product does not wait for the one before it.
template <std::size_t Columns>
ENTROLLM_AVX_VNNI void vnni_products(const std::uint8_t* weights, const Digits* x,
                                     std::size_t count, std::int64_t* out) {
  constexpr std::size_t kParts = Columns == 1 ? 2 : 1;
  __m256i high[Columns][kParts];
  __m256i low[Columns][kParts];
  for (std::size_t column = 0; column < Columns; ++column) {
    for (std::size_t part = 0; part < kParts; ++part) {
      high[column][part] = low[column][part] = _mm256_setzero_si256();
    }
  }
  for (std::size_t i = 0; i < count; i += kParts * kHalf) {
    for (std::size_t part = 0; part < kParts; ++part) {
      const std::size_t at = i + part * kHalf;
      const __m256i w = load(weights + at);
      for (std::size_t column = 0; column < Columns; ++column) {
        __m256i& high_sum = high[column][part];
        __m256i& low_sum = low[column][part];
        high_sum = _mm256_dpbusd_avx_epi32(high_sum, w, load(x[column].high + at));
        low_sum = _mm256_dpbusd_avx_epi32(low_sum, w, load(x[column].low + at));
      }
    }
  }
  for (std::size_t column = 0; column < Columns; ++column) {
    out[column] = 0;
    for (std::size_t part = 0; part < kParts; ++part) {
      out[column] += 256 * sum_lanes(high[column][part]) + sum_lanes(low[column][part]);
    }
  }
}

ENTROLLM_AVX_VNNI std::int64_t vnni_dot(const std::uint8_t* weights, const Digits& x,
                                        std::size_t count) {
  std::int64_t sum;
  vnni_products<1>(weights, &x, count, &sum);
  return sum;
}

ENTROLLM_AVX_VNNI void vnni_dot_tile(const std::uint8_t* weights, const Digits* x,
                                     std::size_t count, std::int64_t* out) {
  vnni_products<kColumnTile>(weights, x, count, out);
}

#undef ENTROLLM_AVX_VNNI

}  // namespace

const Kernels kAvx2Kernels = {.name = "avx2",
                              .sparse_field = sparse_field,
                              .dense_field = dense_field,
                              .split = split,
                              .or_low_bits = or_low_bits,
                              .count_all_ones = count_all_ones,
                              .dot = dot,
                              .dot_tile = dot_tile,
                              .flat = &kAvx2FlatKernels,
                              .floats = &kAvx2FloatKernels};

const Kernels kAvx2VnniKernels = {.name = "avx2-vnni",
                                  .sparse_field = sparse_field,
                                  .dense_field = dense_field,
                                  .split = split,
                                  .or_low_bits = or_low_bits,
                                  .count_all_ones = count_all_ones,
                                  .dot = vnni_dot,
                                  .dot_tile = vnni_dot_tile,
                                  .flat = &kAvx2VnniFlatKernels,
                                  .floats = &kAvx2FloatKernels};

}  // namespace entrollm
