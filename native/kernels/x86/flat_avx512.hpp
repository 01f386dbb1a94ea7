// Flat fields in registers of 64 bytes. Internal linkage, as in generic/flat_pack.hpp.
#pragma once

#include <immintrin.h>

#include "format/flat.hpp"

namespace entrollm {
namespace {

struct FlatLanes {
  static constexpr std::size_t kLanes = 64;
  using Bytes = __m512i;

  template <int Bits, std::size_t Register>
  [[gnu::always_inline]] static inline Bytes fields(const std::uint8_t* chunk) {
    if constexpr (Bits == 8) return _mm512_loadu_si512(chunk);
    Bytes bytes = _mm512_setzero_si512();
    if constexpr (has_flat_part(Bits, 4)) {
      const __m512i all =
          _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk)));
      bytes = insert<15>(bytes, _mm512_srlv_epi64(all, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)));
    }
    // Rotations move bits to higher or lower places of their byte alike; the mask drops those that
    // enter from neighbouring bytes.
    if constexpr (has_flat_part(Bits, 2)) {
      constexpr int kAt = flat_part_shift(Bits, 2);
      const __m512i all = _mm512_broadcast_i32x4(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk + flat_part_offset(Bits, 2))));
      const __m512i counts =
          _mm512_setr_epi64(kAt, kAt, kAt - 2, kAt - 2, kAt - 4, kAt - 4, kAt - 6, kAt - 6);
      bytes = insert<3 << kAt>(bytes, _mm512_rolv_epi64(all, counts));
    }
    if constexpr (has_flat_part(Bits, 1)) {
      constexpr int kAt = flat_part_shift(Bits, 1);
      long long eight;
      __builtin_memcpy(&eight, chunk + flat_part_offset(Bits, 1), sizeof eight);
      const __m512i counts =
          _mm512_setr_epi64(kAt, kAt - 1, kAt - 2, kAt - 3, kAt - 4, kAt - 5, kAt - 6, kAt - 7);
      bytes = insert<1 << kAt>(bytes, _mm512_rolv_epi64(_mm512_set1_epi64(eight), counts));
    }
    return bytes;
  }

  // Sixteen entries, and those that bytes below 16 choose.
  using Table = Bytes;
  [[gnu::always_inline]] static inline Table load_table(const std::uint8_t* entries) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  [[gnu::always_inline]] static inline Bytes look_up(Table table, Bytes bytes) {
    return _mm512_shuffle_epi8(table, bytes);
  }

  [[gnu::always_inline]] static inline void store(std::uint8_t* out, Bytes bytes) {
    _mm512_storeu_si512(out, bytes);
  }
  [[gnu::always_inline]] static inline Bytes splat(std::uint8_t value) {
    return _mm512_set1_epi8(static_cast<char>(value));
  }
  [[gnu::always_inline]] static inline Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }

 private:
  // bytes | (more & Mask)
  template <int Mask>
  [[gnu::always_inline]] static inline Bytes insert(Bytes bytes, Bytes more) {
    return _mm512_ternarylogic_epi64(bytes, more, splat(Mask), 0xf8);
  }
};

}  // namespace
}  // namespace entrollm
