// Lossless products of AVX-512. Products in float32 keep activations whole, and cost as much as
// those of VDPBF16PS with activations in two parts.
#include <immintrin.h>

#include "kernels/generic/lossless_kernels_of.hpp"
#include "kernels/x86/avx512_cascade.hpp"

namespace entrollm {
namespace {

struct LosslessLanes {
  static constexpr std::size_t kFloats = 16;
  static constexpr std::size_t kMostVectors = 4;
  static constexpr std::size_t kPanelVectors = 4;
  using Floats = __m512;

  [[gnu::always_inline]] static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
  [[gnu::always_inline]] static inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  [[gnu::always_inline]] static inline Floats add(Floats a, Floats b) {
    return _mm512_add_ps(a, b);
  }
  [[gnu::always_inline]] static inline Floats add_product(Floats sum, Floats a, Floats b) {
    return _mm512_fmadd_ps(a, b, sum);
  }

  template <WordFormat Format>
  [[gnu::always_inline]] static inline void weights(const std::uint8_t* high,
                                                    const std::uint8_t* low, Floats (&out)[4]) {
    weights_of<Format>(_mm512_loadu_si512(high), _mm512_loadu_si512(low), out);
  }

  template <WordFormat Format>
  [[gnu::always_inline]] static inline void weights_of(__m512i high, __m512i low,
                                                       Floats (&out)[4]) {
    words<Format>(_mm512_unpacklo_epi8(low, high), out[0], out[1]);
    words<Format>(_mm512_unpackhi_epi8(low, high), out[2], out[3]);
  }

 private:
  template <WordFormat Format>
  [[gnu::always_inline]] static inline void words(__m512i rotated, Floats& first, Floats& second) {
    const __m512i word = _mm512_shrdi_epi16(rotated, rotated, 1);
    if constexpr (Format == WordFormat::kBfloat16) {
      first = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
      second = _mm512_castsi512_ps(
          _mm512_and_si512(word, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    } else {
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      const __m512i sorted = _mm512_permutexvar_epi64(order, word);
      first = _mm512_cvtph_ps(_mm512_castsi512_si256(sorted));
      second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(sorted, 1));
    }
  }
};

// Low bytes are requested this far ahead of their use.
constexpr std::size_t kLowAheadBytes = 8192;

// Products of the weights of a row with one, two or four vectors.
template <std::size_t Vectors>
struct RowSums {
  __m512 sums[Vectors][4];

  void load(const float* lanes) {
    for (std::size_t v = 0; v < Vectors; ++v) {
      for (std::size_t run = 0; run < 4; ++run) {
        sums[v][run] = LosslessLanes::load(lanes + v * kLosslessLanes + run * kLosslessRun);
      }
    }
  }
  void store(float* lanes) const {
    for (std::size_t v = 0; v < Vectors; ++v) {
      for (std::size_t run = 0; run < 4; ++run) {
        LosslessLanes::store(lanes + v * kLosslessLanes + run * kLosslessRun, sums[v][run]);
      }
    }
  }
  [[gnu::always_inline]] inline void add(__m512i high, const std::uint8_t* low, const float* x,
                                         std::size_t x_stride) {
    __m512 weights[4];
    LosslessLanes::weights_of<WordFormat::kBfloat16>(high, _mm512_loadu_si512(low), weights);
    for (std::size_t run = 0; run < 4; ++run) {
      for (std::size_t v = 0; v < Vectors; ++v) {
        sums[v][run] = LosslessLanes::add_product(
            sums[v][run], weights[run], LosslessLanes::load(x + run * kLosslessRun + v * x_stride));
      }
    }
  }
};

template <std::size_t Vectors>
struct For {
  template <int Bits, bool Escape>
  struct Multiply {
    static std::size_t run(const CascadeBlock& block, const LosslessRun& product,
                           std::size_t first_column) {
      RootDecoder<Bits, Escape, 0> root(block.root, nullptr);
      const std::size_t eights = block.vectors / 8;
      for (std::size_t row = 0; row < block.rows; ++row) {
        float* lanes = product.lanes + (block.first_row + row) * Vectors * kLosslessLanes;
        const std::uint8_t* low =
            product.low + (block.first_row + row) * product.columns + first_column;
        const float* x = product.x + first_column;
        RowSums<Vectors> sums;
        sums.load(lanes);
        for_eights<Bits, 0>(
            block.root.fields, row * eights, eights, [&]<int Step>(std::size_t eight) {
              _mm_prefetch(reinterpret_cast<const char*>(low + Step * kVector + kLowAheadBytes),
                           _MM_HINT_T1);
              sums.add(root.template next<Step>(eight), low + Step * kVector, x + Step * kVector,
                       product.x_stride);
              if constexpr (Step == 7) {
                low += 8 * kVector;
                x += 8 * kVector;
              }
            });
        sums.store(lanes);
      }
      return root.escapes;
    }
  };
};

template <std::size_t Vectors>
std::size_t multiply_run(const CascadeRun& run, const LosslessRun& product) {
  const auto multiply = instantiation<0, 2 * kMostFusedRootBits - 1>(
      2 * (run.code->bits[0] - 1) + (run.code->levels > 1 ? 1 : 0),
      []<int I>() { return &For<Vectors>::template Multiply<I / 2 + 1, I % 2 != 0>::run; });
  return for_blocks_of(run, [&](const CascadeBlock& block) {
    if (block.part == 0) {
      float* lanes = product.lanes + block.first_row * Vectors * kLosslessLanes;
      for (std::size_t i = 0; i < block.rows * Vectors * kLosslessLanes; ++i) lanes[i] = 0.0f;
    }
    return multiply(block, product, block.part * run.block_columns);
  });
}

std::size_t cascade_bfloat16(const CascadeRun& run, const LosslessRun& product) {
  if (product.vectors == 1) return multiply_run<1>(run, product);
  return product.vectors == 2 ? multiply_run<2>(run, product) : multiply_run<4>(run, product);
}

}  // namespace

const LosslessKernels kAvx512LosslessKernels = [] {
  LosslessKernels kernels = lossless_kernels_of<LosslessLanes>();
  kernels.cascade_bfloat16 = cascade_bfloat16;
  return kernels;
}();

}  // namespace entrollm
