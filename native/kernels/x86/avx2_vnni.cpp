#include "kernels/x86/avx2_vnni.hpp"

#include "kernels/generic/dot_kernels_of.hpp"
#include "kernels/x86/avx2_products.hpp"

namespace entrollm {
namespace {

struct VnniProducts {
  static constexpr std::size_t kPartBytes = 32;

  static __m256i load(const std::uint8_t* weights) { return load_digits(weights); }

  // A single vector has two sums for each digit, so that no product waits for the one before it.
  template <std::size_t Columns>
  struct Sums {
    static constexpr std::size_t kParts = Columns == 1 ? 2 : 1;
    static constexpr std::size_t kStep = kParts * kPartBytes;
    __m256i high[kParts];
    __m256i low[kParts];

    Sums() {
      for (std::size_t part = 0; part < kParts; ++part) {
        high[part] = low[part] = _mm256_setzero_si256();
      }
    }

    template <std::size_t Part>
    void add(__m256i weights, const Digits& x, std::size_t at) {
      high[Part] = _mm256_dpbusd_avx_epi32(high[Part], weights, load_digits(x.high + at));
      low[Part] = _mm256_dpbusd_avx_epi32(low[Part], weights, load_digits(x.low + at));
    }

    std::int64_t total(const Digits&, std::size_t) const {
      std::int64_t sum = 0;
      for (std::size_t part = 0; part < kParts; ++part) {
        sum += 256 * sum_lanes(high[part]) + sum_lanes(low[part]);
      }
      return sum;
    }
  };
};

}  // namespace

std::int64_t avx2_vnni_dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  return dot<VnniProducts>(weights, x, count);
}

void avx2_vnni_dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count,
                        std::int64_t* out) {
  dot_tile<VnniProducts>(weights, x, count, out);
}

}  // namespace entrollm
