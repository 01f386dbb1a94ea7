#include "ops/ops.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

// Less work than this is done sooner by one thread than it is shared. The unit is the time to read
// a float.
constexpr std::size_t kShared = 1 << 15;

// Calls body(begin, end) for ranges that cover `rows` rows. A row costs `cost` units.
template <class Body>
void for_rows(ThreadPool& pool, std::size_t rows, std::size_t cost, Body body) {
  if (pool.size() == 1 || rows * cost < kShared) return body(std::size_t{0}, rows);
  const std::size_t tasks = std::min(rows, 4 * pool.size());
  pool.run(tasks, [&](std::size_t task, std::size_t) {
    body(rows * task / tasks, rows * (task + 1) / tasks);
  });
}

// Computes one tile of the queries that share a key-value head: rows [begin, end) of its
// (tokens, query heads).
void attend_tile(const Attention& op, std::size_t kv_head, std::size_t begin, std::size_t end) {
  thread_local std::vector<float> scratch;
  const std::size_t sharing = op.heads / op.kv_heads;  // query heads of a key-value head
  AttentionTile tile{};
  tile.rows = end - begin;
  for (std::size_t row = begin; row < end; ++row) {
    const std::size_t token = row / sharing;
    const std::size_t head = kv_head * sharing + row % sharing;
    const std::size_t last = op.length - op.tokens + token + 1;
    tile.queries[row - begin] = op.queries + token * op.token_stride + head * op.head_dim;
    tile.outputs[row - begin] = op.out + (token * op.heads + head) * op.head_dim;
    tile.firsts[row - begin] = op.window && last > *op.window ? last - *op.window : 0;
    tile.lasts[row - begin] = last;
  }
  scratch.resize(attention_scratch(tile.lasts[tile.rows - 1] - tile.firsts[0]));
  tile.head_dim = op.head_dim;
  tile.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(op.head_dim)));
  tile.keys = op.keys + kv_head * op.key_head_stride;
  tile.key_stride = op.key_stride;
  tile.values = op.values + kv_head * op.value_head_stride;
  tile.scratch = scratch.data();
  kernels().floats->attend(tile);
}

}  // namespace

void run(ThreadPool& pool, const RmsNorm& op) {
  for_rows(pool, op.rows, op.features, [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      const std::size_t place = row % op.weight_rows * op.features;
      const float* weight = op.weight + place;
      const std::size_t at = row / op.weight_rows * op.stride + place;
      kernels().floats->rms_norm(op.x + at, weight, op.features, op.eps, op.out + at);
    }
  });
}

void run(ThreadPool& pool, const Rotation& op) {
  for_rows(pool, op.tokens, op.heads * op.head_dim, [&](std::size_t begin, std::size_t end) {
    for (std::size_t token = begin; token < end; ++token) {
      for (std::size_t head = 0; head < op.heads; ++head) {
        kernels().floats->rotate(op.x + token * op.token_stride + head * op.head_dim,
                                 op.cosines + token * op.half, op.sines + token * op.half, op.half);
      }
    }
  });
}

void run(ThreadPool& pool, const GatedUnits& op) {
  const auto gated = op.gate == Gate::kSilu ? kernels().floats->swiglu : kernels().floats->geglu;
  constexpr std::size_t kExpCost = 4;
  for_rows(pool, op.rows, op.features * kExpCost, [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      const float* gate = op.gate_up + row * 2 * op.features;
      gated(gate, gate + op.features, op.features, op.out + row * op.features);
    }
  });
}

void run(ThreadPool& pool, const Attention& op) {
  if (op.heads == 0 || op.tokens == 0) return;
  const std::size_t rows = op.heads / op.kv_heads * op.tokens;
  const std::size_t tiles = (rows + kAttentionRows - 1) / kAttentionRows;
  const std::size_t seen = op.window ? std::min(*op.window + op.tokens, op.length) : op.length;
  const std::size_t cost = 2 * seen * op.head_dim;
  for_rows(pool, op.kv_heads * tiles, cost, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t first = i % tiles * kAttentionRows;
      attend_tile(op, i / tiles, first, std::min(rows, first + kAttentionRows));
    }
  });
}

}  // namespace entrollm
