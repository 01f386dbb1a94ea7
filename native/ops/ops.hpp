// The operations of a decoder between its matrix products, on rows of float32.
#pragma once

#include <cstddef>
#include <optional>

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

// Causal attention of the last `tokens` of `length` positions. heads / kv_heads query heads share a
// key-value head.
struct Attention {
  const float* queries;  // (tokens, heads, head_dim), tokens `token_stride` apart
  std::size_t tokens;
  std::size_t token_stride;
  std::size_t heads;
  std::size_t head_dim;
  const float* keys;     // (kv_heads, head_dim, length)
  std::size_t kv_heads;  // divides heads
  std::size_t length;    // at least tokens
  std::size_t key_head_stride;
  std::size_t key_stride;  // floats between features
  const float* values;     // (kv_heads, length, head_dim)
  std::size_t value_head_stride;
  std::optional<std::size_t> window;  // positions that a token sees, with its own; at least 1
  float* out;                         // (tokens, heads, head_dim)
};
void run(ThreadPool& pool, const Attention& op);

}  // namespace entrollm
