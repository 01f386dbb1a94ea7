// The definition of the kernels of lossless matrices, in plain C++.
#include <cmath>

#include "format/words.hpp"
#include "kernels/generic/lossless_kernels_of.hpp"

namespace entrollm {
namespace {

struct LosslessLanes {
  static constexpr std::size_t kFloats = 4;
  static constexpr std::size_t kMostVectors = 1;
  static constexpr std::size_t kPanelVectors = 1;
  struct Floats {
    float lane[kFloats];
  };

  static Floats load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store(float* p, const Floats& v) {
    for (std::size_t i = 0; i < kFloats; ++i) p[i] = v.lane[i];
  }
  static Floats add(Floats a, const Floats& b) {
    for (std::size_t i = 0; i < kFloats; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Floats add_product(Floats sum, const Floats& a, const Floats& b) {
    for (std::size_t i = 0; i < kFloats; ++i) {
      sum.lane[i] = std::fma(a.lane[i], b.lane[i], sum.lane[i]);
    }
    return sum;
  }

  template <WordFormat Format>
  static void weights(const std::uint8_t* high, const std::uint8_t* low, Floats (&out)[4]) {
    std::uint16_t words[4 * kFloats];
    join_words(high, low, 4 * kFloats, words);
    for (std::size_t run = 0; run < 4; ++run) {
      for (std::size_t lane = 0; lane < kFloats; ++lane) {
        const std::uint16_t word = words[lossless_column(Format, run, lane)];
        out[run].lane[lane] =
            Format == WordFormat::kBfloat16 ? bfloat16_value(word) : half_value(word);
      }
    }
  }
};

}  // namespace

const LosslessKernels kScalarLosslessKernels = lossless_kernels_of<LosslessLanes>();

}  // namespace entrollm
