// The kernels of AVX2 and, in a second table, those with the products of AVX-VNNI.
#include <utility>

#include "kernels/generic/kernels_of.hpp"
#include "kernels/kernels.hpp"
#include "kernels/x86/avx2_products.hpp"
#include "kernels/x86/avx2_vectors.hpp"
#include "kernels/x86/avx2_vnni.hpp"

namespace entrollm {
namespace {

// Weights and activations are multiplied in 16 bits, since VPMADDUBSW would saturate.
struct Avx2Products {
  static constexpr std::size_t kPartBytes = 16;

  static __m256i load(const std::uint8_t* weights) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
  }

  // 4096 weights add 256 products to each of 16 lanes: below 256 * 255 * 32768 < 2^31.
  template <std::size_t Columns>
  struct Sums {
    static constexpr std::size_t kStep = 2 * kPartBytes;
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};

    template <std::size_t Part>
    void add(__m256i weights, const Digits& x, std::size_t at) {
      sum[Part] =
          _mm256_add_epi32(sum[Part], _mm256_madd_epi16(weights, load_digits(x.whole + at)));
    }
    std::int64_t total(const Digits&, std::size_t) const {
      return sum_lanes(sum[0]) + sum_lanes(sum[1]);
    }
  };
};

// The totals of four sums.
__m256i totals(__m256i a, __m256i b, __m256i c, __m256i d) {
  const auto halve = [](__m256i v) {
    return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
  };
  const auto pair = [](__m256i v, __m256i w) {
    return _mm256_add_epi64(_mm256_unpacklo_epi64(v, w), _mm256_unpackhi_epi64(v, w));
  };
  const __m256i ab = pair(halve(a), halve(b)), cd = pair(halve(c), halve(d));
  return _mm256_add_epi64(_mm256_permute2x128_si256(ab, cd, 0x20),
                          _mm256_permute2x128_si256(ab, cd, 0x31));
}

// Compilers load operands again for each product and copy sums around in loops.
inline void keep_in_register(__m256i& v) { asm("" : "+x"(v)); }
inline void add_sums(__m256i& sums, __m256i products) {
  asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
}

// Eight sums, of which each load serves two or four. Indices are constants throughout, which keeps
// them in registers. kDotRowsColumns columns add 256 products to each of 8 lanes, as above.
template <std::size_t... I>
void dot_tile_pair_of(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                      std::size_t count, std::int64_t* out, std::index_sequence<I...>) {
  __m256i sums[] = {(static_cast<void>(I), _mm256_setzero_si256())...};
  const std::int16_t* columns[] = {x[0].whole, x[1].whole, x[2].whole, x[3].whole};
  const auto add_part = [&](std::size_t at) __attribute__((always_inline)) {
    const __m256i rows[] = {Avx2Products::load(weights + at),
                            Avx2Products::load(weights + stride + at)};
    __m256i digits[kColumnTile] = {load_digits(columns[0] + at), load_digits(columns[1] + at),
                                   load_digits(columns[2] + at), load_digits(columns[3] + at)};
    (keep_in_register(digits[I / 2]), ...);
    (add_sums(sums[I], _mm256_madd_epi16(rows[I % 2], digits[I / 2])), ...);
  };
  for (std::size_t i = 0; i < count; i += 2 * Avx2Products::kPartBytes) {
    add_part(i);
    add_part(i + Avx2Products::kPartBytes);
  }
  const auto store = [](std::int64_t* to, __m256i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  };
  store(out, totals(sums[0], sums[2], sums[4], sums[6]));
  store(out + kColumnTile, totals(sums[1], sums[3], sums[5], sums[7]));
}

void dot_tile_pair(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                   std::size_t count, std::int64_t* out) {
  dot_tile_pair_of(weights, stride, x, count, out, std::make_index_sequence<2 * kColumnTile>());
}

constexpr Kernels kTable = [] {
  Kernels kernels = kernels_of<Avx2Vectors, Avx2Products>("avx2");
  kernels.dot_tile_rows = dot_tile_pair;
  kernels.encode = &kAvx2EncodeKernels;
  kernels.flat = &kAvx2FlatKernels;
  kernels.lossless = &kAvx2LosslessKernels;
  kernels.grouped = &kAvx2GroupedKernels;
  kernels.floats = &kAvx2FloatKernels;
  return kernels;
}();

}  // namespace

constinit const Kernels kAvx2Kernels = kTable;

constinit const Kernels kAvx2VnniKernels = [] {
  Kernels kernels = kTable;
  kernels.name = "avx2-vnni";
  kernels.flat = &kAvx2VnniFlatKernels;
  kernels.lossless = &kAvx2LosslessKernels;
  kernels.grouped = &kAvx2VnniGroupedKernels;
  kernels.dot_tile_rows = nullptr;  // its products of digits have too many sums for two rows
  kernels.dot = avx2_vnni_dot;
  kernels.dot_tile = avx2_vnni_dot_tile;
  return kernels;
}();

}  // namespace entrollm
