// The arithmetic between the products, in float32. All instruction sets give the same bits: sums
// are taken in the same sixteen lanes, and no product is contracted with a sum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {

// Rows of queries that share one pass over the keys and values.
inline constexpr std::size_t kAttentionRows = 4;

struct AttentionTile {
  std::size_t rows;  // 1 to kAttentionRows
  const float* queries[kAttentionRows];
  float* outputs[kAttentionRows];
  std::size_t firsts[kAttentionRows];  // a row sees positions [first, last), at least one
  std::size_t lasts[kAttentionRows];
  std::size_t head_dim;
  float scale;             // of the scores
  const float* keys;       // (head_dim, positions), features `key_stride` apart
  std::size_t key_stride;  // floats
  const float* values;     // (positions, head_dim)
  float* scratch;          // attention_scratch() floats
};

// Floats of scratch for a tile whose rows see positions within a range of `positions`.
constexpr std::size_t attention_scratch(std::size_t positions) {
  return kAttentionRows * ((positions + 15) / 16 * 16);
}

// Turns the exact sums of some rows with eight activation vectors into results.
struct SumScaling {
  const std::int64_t* sums;  // (rows, 8)
  std::size_t rows;
  const float* scales;  // of the rows, `scale_step` (0 or 1) apart
  std::size_t scale_step;
  const float* offsets;  // likewise
  std::size_t offset_step;
  const double* x_sums;  // of the activation vectors, 8 of each
  const double* x_scales;
  std::size_t columns;  // vectors to write, at most 8
  float* out;           // (columns, rows), columns `stride` apart
  std::size_t stride;
};

struct FloatKernels {
  // The largest magnitude as float bits, which order as integers do; at least those of infinity
  // when an entry is not finite.
  std::int32_t (*largest_bits)(const float* x, std::size_t count);

  // Rounds x times two factors to integers and splits them into balanced base-256 digits.
  void (*split_digits)(const float* x, std::size_t count, float lift, float inverse,
                       std::int16_t* whole, std::int8_t* high, std::int8_t* low);

  // out = (scale * sum + offset * x_sum) * x_scale in float64, rounded to float32.
  void (*scale_sums)(const SumScaling& scaling);

  // out = x / sqrt(mean(x * x) + eps) * weight, over `count` features.
  void (*rms_norm)(const float* x, const float* weight, std::size_t count, float eps, float* out);

  // Rotates feature i with feature i + half by the angle whose cosine and sine are given, in place.
  void (*rotate)(float* x, const float* cosines, const float* sines, std::size_t half);

  // out = gate / (1 + exp(-gate)) * up.
  void (*swiglu)(const float* gate, const float* up, std::size_t count, float* out);

  // softmax(queries keys * scale) values, each row over the positions that it sees.
  void (*attend)(const AttentionTile& tile);
};

extern const FloatKernels kPortableFloatKernels;
extern const FloatKernels kAvx2FloatKernels;
extern const FloatKernels kAvx512FloatKernels;

}  // namespace entrollm
