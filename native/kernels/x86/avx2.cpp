// The kernels of AVX2 and, in a second table, those with the products of AVX-VNNI.
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

constexpr Kernels kTable = [] {
  Kernels kernels = kernels_of<Avx2Vectors, Avx2Products>("avx2");
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
  kernels.dot = avx2_vnni_dot;
  kernels.dot_tile = avx2_vnni_dot_tile;
  return kernels;
}();

}  // namespace entrollm
