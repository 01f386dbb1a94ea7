// The steps of encoding, 64 symbols at a time.
#include "kernels/x86/avx512_parts.hpp"
#include "kernels/x86/avx512_vectors.hpp"

namespace entrollm {
namespace {

std::uint8_t map_symbols(const std::uint8_t* in, std::size_t count, std::uint8_t mask,
                         const std::uint8_t* map, std::uint8_t* out) {
  const __m512i keep = _mm512_set1_epi8(static_cast<char>(mask));
  const __m512i quarter[4] = {load(map), load(map + 64), load(map + 128), load(map + 192)};
  __m512i seen = _mm512_setzero_si512();
  for (std::size_t i = 0; i < count; i += kVector) {
    // In the last vector, only the lanes below the end of the list count.
    const __mmask64 used = below(count - i);
    const __m512i symbol = _mm512_and_si512(load(in + i), keep);
    // Two look-ups of 128 entries each, by the low seven bits; the top bit chooses between them.
    const __m512i low = _mm512_permutex2var_epi8(quarter[0], symbol, quarter[1]);
    const __m512i high = _mm512_permutex2var_epi8(quarter[2], symbol, quarter[3]);
    const __m512i field = _mm512_mask_blend_epi8(_mm512_movepi8_mask(symbol), low, high);
    store(out + i, field);
    seen = _mm512_or_si512(seen, _mm512_maskz_mov_epi8(used, field));
  }
  const __m256i half =
      _mm256_or_si256(_mm512_castsi512_si256(seen), _mm512_extracti64x4_epi64(seen, 1));
  const __m128i part =
      _mm_or_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  std::uint64_t word = static_cast<std::uint64_t>(_mm_extract_epi64(part, 0)) |
                       static_cast<std::uint64_t>(_mm_extract_epi64(part, 1));
  for (int shift = 32; shift >= 8; shift /= 2) word |= word >> shift;
  return static_cast<std::uint8_t>(word);
}

void pack_plane(const std::uint8_t* fields, std::size_t count, int bit, std::uint8_t* out) {
  const __m512i wanted = _mm512_set1_epi8(static_cast<char>(1 << bit));
  for (std::size_t i = 0; i < count; i += kVector) {
    const std::size_t left = count - i;
    const std::uint64_t word = _mm512_test_epi8_mask(load(fields + i), wanted) & below(left);
    __builtin_memcpy(out + i / 8, &word, left >= kVector ? 8 : (left + 7) / 8);
  }
}

template <int Width>
void pack_fields_of(const std::uint8_t* fields, std::size_t count, int shift, std::uint8_t* out) {
  constexpr std::size_t kPerByte = 8 / Width;
  const __m512i mask = _mm512_set1_epi8((1 << Width) - 1);
  const std::size_t vectors = count / kVector;
  for (std::size_t vector = 0; vector < vectors; vector += kPerByte) {
    __m512i packed = _mm512_setzero_si512();
    for (std::size_t i = 0; i < kPerByte && vector + i < vectors; ++i) {
      const __m512i field = load(fields + (vector + i) * kVector);
      const __m512i part =
          _mm512_and_si512(_mm512_srli_epi16(field, static_cast<unsigned>(shift)), mask);
      packed = _mm512_or_si512(packed, _mm512_slli_epi16(part, static_cast<unsigned>(i) * Width));
    }
    store(out + vector / kPerByte * kVector, packed);
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

std::size_t select(const std::uint8_t* symbols, const std::uint8_t* fields, std::size_t count,
                   std::uint8_t field, std::uint8_t* out) {
  const __m512i wanted = _mm512_set1_epi8(static_cast<char>(field));
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; i += kVector) {
    const __mmask64 mask = _mm512_cmpeq_epi8_mask(load(fields + i), wanted) & below(count - i);
    store(out + kept, _mm512_maskz_compress_epi8(mask, load(symbols + i)));
    kept += popcount(mask);
  }
  return kept;
}

}  // namespace

const EncodeKernels kAvx512EncodeKernels = {map_symbols, pack_plane, pack_fields, select};

}  // namespace entrollm
