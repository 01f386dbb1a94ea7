// The arithmetic between the products, in float32. All instruction sets give the same bits: they
// add in the same sixteen lanes, and they contract no product with a sum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {

// How keys and values are held: as they are, rounded to half precision, or as integers of which
// each head of a position has a scale.
enum class CacheType : std::uint8_t { kFloat32, kFloat16, kInt8 };

// The number of query rows that share one pass over the keys and values.
inline constexpr std::size_t kAttentionRows = 8;
// Positions whose keys, values and scores stay in a cache while all rows of a tile use them.
inline constexpr std::size_t kPositionsAtOnce = 256;

// Keys and values of consecutive positions of a head.
struct PositionRun {
  std::size_t count;
  const void* keys;           // (head_dim, count)
  std::size_t key_stride;     // elements from a feature of the keys to the next
  const void* values;         // (count, head_dim)
  const float* key_scales;    // (count); null unless kInt8
  const float* value_scales;  // likewise
};

struct AttentionTile {
  std::size_t rows;  // 1 to kAttentionRows
  const float* queries[kAttentionRows];
  float* outputs[kAttentionRows];
  std::size_t firsts[kAttentionRows];  // a row sees positions [first, last), which are not empty
  std::size_t lasts[kAttentionRows];
  std::size_t head_dim;
  float scale;  // of the scores
  CacheType type;
  // The runs follow each other. Results are those of a single run if the lengths of all but the
  // last are multiples of kPositionsAtOnce.
  const PositionRun* runs;
  std::size_t run_count;
  float* scratch;          // attention_scratch() floats
  std::int16_t* integers;  // attention_integers() integers; unused unless kInt8
};

// The number of floats of scratch for a tile.
constexpr std::size_t attention_scratch(std::size_t head_dim) {
  return kAttentionRows * (kPositionsAtOnce + 2 * head_dim);
}

// The number of integers of scratch for a tile of kInt8.
constexpr std::size_t attention_integers(std::size_t head_dim) {
  return kAttentionRows * (kPositionsAtOnce + head_dim + 1);
}

// Computes results from the exact sums of some rows with eight activation vectors.
struct SumScaling {
  const std::int64_t* sums;  // 8 of each row, rows `sum_stride` apart
  std::size_t sum_stride;
  std::size_t rows;
  const float* scales;  // one for each row, or one for all: `scale_step` is 1 or 0
  std::size_t scale_step;
  const float* offsets;  // likewise
  std::size_t offset_step;
  const double* x_sums;  // of the 8 activation vectors, like x_scales
  const double* x_scales;
  std::size_t columns;  // vectors to write, at most 8
  float* out;           // (columns, rows), columns `stride` apart
  std::size_t stride;
};

struct FloatKernels {
  // The bits of the largest magnitude, which compare as integers. They are at least those of
  // infinity if an entry is not finite.
  std::int32_t (*largest_bits)(const float* x, std::size_t count);

  // Multiplies x by two factors, rounds to integers, and splits these into balanced base-256
  // digits.
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

  // out = gelu(gate) * up, where gelu is the approximation by a hyperbolic tangent.
  void (*geglu)(const float* gate, const float* up, std::size_t count, float* out);

  // outputs = softmax(queries keys * scale) values, each row over the positions that it sees. With
  // kInt8, queries are rounded to 16 bits, and weights to 16 bits of the largest in each run of
  // kPositionsAtOnce.
  void (*attend)(const AttentionTile& tile);

  // out = x rounded to half precision, to the nearest and of two to the even one. Larger values
  // become the largest.
  void (*round_to_half)(const float* x, std::size_t count, std::uint16_t* out);

  // out = x divided by the returned scale, the largest magnitude over 127, and rounded.
  float (*round_to_int8)(const float* x, std::size_t count, std::int8_t* out);

  // Multiplies each run of the largest power of two that divides `count` by an orthonormal Hadamard
  // matrix, which is its own inverse, in place.
  void (*spread)(float* x, std::size_t count);
};

extern const FloatKernels kPortableFloatKernels;
extern const FloatKernels kAvx2FloatKernels;
extern const FloatKernels kAvx512FloatKernels;

}  // namespace entrollm
