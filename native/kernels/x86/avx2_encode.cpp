// The steps of encoding with AVX2, 32 symbols at a time. Lists may be read and written up to kSlack
// bytes past their end.
#include <immintrin.h>

#include <array>

#include "kernels/generic/words.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kHalf = 32;
constexpr std::size_t kEight = 8;

__m256i load(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

void store(std::uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

std::uint32_t top_bits(__m256i v) { return static_cast<std::uint32_t>(_mm256_movemask_epi8(v)); }

// 16 entries of a map.
struct Entries {
  __m256i first;  // the first symbol, in every byte
  __m256i found;  // the entries, inverted, so that what no shuffle finds becomes 0xff
};

std::uint8_t map_symbols(const std::uint8_t* in, std::size_t count, std::uint8_t mask,
                         const std::uint8_t* map, std::uint8_t* out) {
  constexpr std::size_t kEntries = 16;
  const __m256i ones = _mm256_set1_epi8(-1);
  // Symbols are usually neighbours, so that few parts of the map have entries.
  Entries parts[256 / kEntries];
  std::size_t used = 0;
  for (std::size_t first = 0; first < 256; first += kEntries) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(map + first));
    const __m128i inverted = _mm_xor_si128(entries, _mm256_castsi256_si128(ones));
    if (_mm_testz_si128(inverted, inverted)) continue;
    parts[used++] = {_mm256_set1_epi8(static_cast<char>(first)),
                     _mm256_broadcastsi128_si256(inverted)};
  }
  const __m256i keep = _mm256_set1_epi8(static_cast<char>(mask));
  // Added with saturation, this sets the top bit of indices from 16 on, which shuffles to zero.
  const __m256i limit = _mm256_set1_epi8(0x70);
  __m256i seen = _mm256_setzero_si256();
  const auto map_half = [&](std::size_t i) {
    const __m256i symbol = _mm256_and_si256(load(in + i), keep);
    __m256i inverted = _mm256_setzero_si256();
    for (std::size_t part = 0; part < used; ++part) {
      const __m256i index = _mm256_adds_epu8(_mm256_sub_epi8(symbol, parts[part].first), limit);
      inverted = _mm256_or_si256(inverted, _mm256_shuffle_epi8(parts[part].found, index));
    }
    const __m256i field = _mm256_xor_si256(inverted, ones);
    store(out + i, field);
    return field;
  };
  std::size_t i = 0;
  for (; i + kHalf <= count; i += kHalf) seen = _mm256_or_si256(seen, map_half(i));
  std::uint8_t all = 0;
  if (i < count) {
    map_half(i);
    for (; i < count; ++i) all |= out[i];
  }
  alignas(kHalf) std::uint8_t bytes[kHalf];
  store(bytes, seen);
  for (const std::uint8_t byte : bytes) all |= byte;
  return all;
}

void pack_plane(const std::uint8_t* fields, std::size_t count, int bit, std::uint8_t* out) {
  const __m128i to_top = _mm_cvtsi32_si128(7 - bit);
  for (std::size_t i = 0; i < count; i += kHalf) {
    const std::size_t left = count - i;
    const std::uint64_t word = top_bits(_mm256_sll_epi16(load(fields + i), to_top)) & below(left);
    __builtin_memcpy(out + i / 8, &word, left >= kHalf ? 4 : (left + 7) / 8);
  }
}

template <int Width>
void pack_fields_of(const std::uint8_t* fields, std::size_t count, int shift, std::uint8_t* out) {
  constexpr std::size_t kPerByte = 8 / Width;
  const __m256i mask = _mm256_set1_epi8((1 << Width) - 1);
  const std::size_t vectors = count / kVector;
  for (std::size_t vector = 0; vector < vectors; vector += kPerByte) {
    for (std::size_t half = 0; half < kVector; half += kHalf) {
      __m256i packed = _mm256_setzero_si256();
      for (std::size_t i = 0; i < kPerByte && vector + i < vectors; ++i) {
        const __m256i field = load(fields + (vector + i) * kVector + half);
        const __m256i part =
            _mm256_and_si256(_mm256_srl_epi16(field, _mm_cvtsi32_si128(shift)), mask);
        packed = _mm256_or_si256(packed, _mm256_slli_epi16(part, static_cast<int>(i) * Width));
      }
      store(out + vector / kPerByte * kVector + half, packed);
    }
  }
}

void pack_fields(const std::uint8_t* fields, std::size_t count, int shift, int width,
                 std::uint8_t* out) {
  if (width == 4) {
    pack_fields_of<4>(fields, count, shift, out);
  } else {
    pack_fields_of<2>(fields, count, shift, out);
  }
}

// For each set of eight bytes, the indices of those bytes, in order.
constexpr std::array<std::uint64_t, 256> kKept = [] {
  std::array<std::uint64_t, 256> found{};
  for (unsigned set = 0; set < 256; ++set) {
    int place = 0;
    for (std::uint64_t i = 0; i < kEight; ++i) {
      if (set >> i & 1) found[set] |= i << 8 * place++;
    }
  }
  return found;
}();

std::size_t select(const std::uint8_t* symbols, const std::uint8_t* fields, std::size_t count,
                   std::uint8_t field, std::uint8_t* out) {
  const __m256i wanted = _mm256_set1_epi8(static_cast<char>(field));
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; i += kHalf) {
    const std::uint64_t marked =
        top_bits(_mm256_cmpeq_epi8(load(fields + i), wanted)) & below(count - i);
    for (std::size_t eight = 0; eight < kHalf / kEight; ++eight) {
      const std::size_t set = marked >> eight * kEight & 0xff;
      const __m128i from =
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(symbols + i + eight * kEight));
      const __m128i order = _mm_cvtsi64_si128(static_cast<long long>(kKept[set]));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + kept), _mm_shuffle_epi8(from, order));
      kept += static_cast<std::size_t>(_mm_popcnt_u32(static_cast<unsigned>(set)));
    }
  }
  return kept;
}

}  // namespace

const EncodeKernels kAvx2EncodeKernels = {map_symbols, pack_plane, pack_fields, select};

}  // namespace entrollm
