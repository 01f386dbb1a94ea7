// The operations of a decoder between its matrix products, on rows of float32.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "kernels/float_kernels.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// out[i] = x[i] / sqrt(mean(x[i]^2) + eps) * weight[i % weight_rows]; x and out are (rows,
// features), which may be the same array. Sets of weight_rows rows begin `stride` floats apart.
struct RmsNorm {
  const float* x;
  std::size_t rows;
  std::size_t features;
  const float* weight;
  std::size_t weight_rows;
  std::size_t stride;
  float eps;
  float* out;
};
void run(ThreadPool& pool, const RmsNorm& op);

// Rotates the first 2 * half features of every head in place: x is (tokens, heads, head_dim) with
// tokens `token_stride` and heads `head_dim` apart; cosines and sines are (tokens, half).
struct Rotation {
  float* x;
  std::size_t tokens;
  std::size_t token_stride;
  std::size_t heads;
  std::size_t head_dim;
  const float* cosines;
  const float* sines;
  std::size_t half;
};
void run(ThreadPool& pool, const Rotation& op);

// out[i] = gate(first half of gate_up[i]) * second half; gate_up is (rows, 2 * features).
enum class Gate { kSilu, kGelu };
struct GatedUnits {
  const float* gate_up;
  std::size_t rows;
  std::size_t features;
  Gate gate;
  float* out;
};
void run(ThreadPool& pool, const GatedUnits& op);

// The keys and values of a sequence. Integers (kInt8) are of features that `spread` has mixed, so
// that none is much larger than the others.
struct CachedPositions {
  CacheType type;
  std::size_t length;
  void* keys;  // (kv_heads, head_dim, length)
  std::size_t key_head_stride;
  std::size_t key_stride;  // elements between features
  void* values;            // (kv_heads, length, head_dim)
  std::size_t value_head_stride;
  float* key_scales;  // (kv_heads, length); null unless kInt8
  float* value_scales;
  std::size_t scale_head_stride;
};

// Writes the keys and values of the last `tokens` positions, each (tokens, kv_heads, head_dim) with
// tokens `stride` floats apart.
struct Append {
  const float* keys;
  const float* values;
  std::size_t tokens;
  std::size_t stride;
  std::size_t kv_heads;
  std::size_t head_dim;
  CachedPositions cache;
};
void run(ThreadPool& pool, std::span<const Append> ops);

// Causal attention of the last `tokens` of the cached positions, which see all earlier ones too.
// heads / kv_heads query heads share a key-value head.
struct Attention {
  const float* queries;  // (tokens, heads, head_dim), tokens `token_stride` apart
  std::size_t tokens;    // at most cache.length
  std::size_t token_stride;
  std::size_t heads;
  std::size_t head_dim;
  std::size_t kv_heads;  // divides heads
  CachedPositions cache;
  std::optional<std::size_t> window;  // positions that a token sees, with its own; at least 1
  float* out;                         // (tokens, heads, head_dim)
  std::span<const CachedPositions> earlier = {};  // positions before, of the same type
};
void run(ThreadPool& pool, std::span<const Attention> ops);

}  // namespace entrollm
