#include "ops/ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
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

// The parts of several operations, one behind the other.
struct Parts {
  std::vector<std::size_t> ends;  // of each operation's parts
  std::size_t cost = 0;           // of all of them
};

template <class Op, class Count, class Cost>
Parts parts_of(std::span<const Op> ops, Count count, Cost cost) {
  Parts parts;
  std::size_t end = 0;
  for (const Op& op : ops) {
    const std::size_t own = count(op);
    parts.ends.push_back(end += own);
    parts.cost += own * cost(op);
  }
  return parts;
}

// Calls body(operation, part) for all parts. They differ in cost, so tasks are small.
template <class Body>
void for_parts(ThreadPool& pool, const Parts& parts, Body body) {
  const std::size_t all = parts.ends.empty() ? 0 : parts.ends.back();
  if (all == 0) return;
  const bool is_shared = pool.size() > 1 && parts.cost >= kShared;
  const std::size_t tasks = is_shared ? std::min(all, 16 * pool.size()) : 1;
  pool.run(tasks, [&](std::size_t task, std::size_t) {
    std::size_t part = all * task / tasks;
    const std::size_t end = all * (task + 1) / tasks;
    auto op = std::upper_bound(parts.ends.begin(), parts.ends.end(), part);
    for (; part < end; ++part) {
      while (part == *op) ++op;
      const std::size_t first = op == parts.ends.begin() ? 0 : *(op - 1);
      body(static_cast<std::size_t>(op - parts.ends.begin()), part - first);
    }
  });
}

const void* moved(const void* data, CacheType type, std::size_t elements) {
  const std::size_t size = type == CacheType::kFloat32   ? sizeof(float)
                           : type == CacheType::kFloat16 ? sizeof(std::uint16_t)
                                                         : sizeof(std::int8_t);
  return static_cast<const char*>(data) + elements * size;
}

const float* moved(const float* scales, std::size_t count) {
  return scales == nullptr ? nullptr : scales + count;
}

// What a key-value head has of some positions.
PositionRun run_of(const CachedPositions& cache, std::size_t kv_head) {
  return {cache.length,
          moved(cache.keys, cache.type, kv_head * cache.key_head_stride),
          cache.key_stride,
          moved(cache.values, cache.type, kv_head * cache.value_head_stride),
          moved(cache.key_scales, kv_head * cache.scale_head_stride),
          moved(cache.value_scales, kv_head * cache.scale_head_stride)};
}

// All positions that attention may see.
std::size_t length_of(const Attention& op) {
  std::size_t length = op.cache.length;
  for (const CachedPositions& each : op.earlier) length += each.length;
  return length;
}

// Computes one tile of the queries that share a key-value head: rows [begin, end) of its
// (tokens, query heads).
void attend_tile(const Attention& op, std::size_t kv_head, std::size_t begin, std::size_t end) {
  thread_local std::vector<float> scratch;
  thread_local std::vector<std::int16_t> integers;
  thread_local std::vector<PositionRun> runs;
  const CachedPositions& cache = op.cache;
  const std::size_t length = length_of(op);
  runs.clear();
  for (const CachedPositions& each : op.earlier) runs.push_back(run_of(each, kv_head));
  runs.push_back(run_of(cache, kv_head));
  const std::size_t sharing = op.heads / op.kv_heads;  // query heads of a key-value head
  const bool is_spread = cache.type == CacheType::kInt8;
  AttentionTile tile{};
  tile.rows = end - begin;
  for (std::size_t row = begin; row < end; ++row) {
    const std::size_t token = row / sharing;
    const std::size_t head = kv_head * sharing + row % sharing;
    const std::size_t last = length - op.tokens + token + 1;
    tile.queries[row - begin] = op.queries + token * op.token_stride + head * op.head_dim;
    tile.outputs[row - begin] = op.out + (token * op.heads + head) * op.head_dim;
    tile.firsts[row - begin] = op.window && last > *op.window ? last - *op.window : 0;
    tile.lasts[row - begin] = last;
  }
  const std::size_t room = attention_scratch(op.head_dim);
  scratch.resize(room + (is_spread ? tile.rows * op.head_dim : 0));
  for (std::size_t row = 0; is_spread && row < tile.rows; ++row) {
    float* const query = scratch.data() + room + row * op.head_dim;
    std::copy_n(tile.queries[row], op.head_dim, query);
    kernels().floats->spread(query, op.head_dim);
    tile.queries[row] = query;
  }
  tile.head_dim = op.head_dim;
  tile.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(op.head_dim)));
  tile.type = cache.type;
  tile.runs = runs.data();
  tile.run_count = runs.size();
  tile.scratch = scratch.data();
  if (is_spread) integers.resize(attention_integers(op.head_dim));
  tile.integers = integers.data();
  kernels().floats->attend(tile);
  for (std::size_t row = 0; is_spread && row < tile.rows; ++row) {
    kernels().floats->spread(tile.outputs[row], op.head_dim);
  }
}

// Writes the keys and values of one head; `Round` turns floats to the elements of the cache, and
// may give a scale.
template <class T, class Round>
void append_head(const Append& op, std::size_t head, Round round) {
  thread_local std::vector<T> rounded;
  const CachedPositions& cache = op.cache;
  const std::size_t dim = op.head_dim, first = cache.length - op.tokens;
  rounded.resize(dim);
  T* const keys = static_cast<T*>(cache.keys) + head * cache.key_head_stride + first;
  T* const values = static_cast<T*>(cache.values) + head * cache.value_head_stride + first * dim;
  for (std::size_t token = 0; token < op.tokens; ++token) {
    const std::size_t from = token * op.stride + head * dim;
    const std::size_t scale = head * cache.scale_head_stride + first + token;
    const float key_scale = round(op.keys + from, rounded.data());
    for (std::size_t i = 0; i < dim; ++i) keys[i * cache.key_stride + token] = rounded[i];
    const float value_scale = round(op.values + from, values + token * dim);
    if (cache.key_scales == nullptr) continue;
    cache.key_scales[scale] = key_scale;
    cache.value_scales[scale] = value_scale;
  }
}

void append_head(const Append& op, std::size_t head) {
  thread_local std::vector<float> mixed;
  const FloatKernels& floats = *kernels().floats;
  const std::size_t dim = op.head_dim;
  switch (op.cache.type) {
    case CacheType::kFloat32:
      return append_head<float>(op, head, [&](const float* x, float* out) {
        std::copy_n(x, dim, out);
        return 0.0f;
      });
    case CacheType::kFloat16:
      return append_head<std::uint16_t>(op, head, [&](const float* x, std::uint16_t* out) {
        floats.round_to_half(x, dim, out);
        return 0.0f;
      });
    case CacheType::kInt8:
      return append_head<std::int8_t>(op, head, [&](const float* x, std::int8_t* out) {
        mixed.assign(x, x + dim);
        floats.spread(mixed.data(), dim);
        return floats.round_to_int8(mixed.data(), dim, out);
      });
  }
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

void run(ThreadPool& pool, std::span<const Append> ops) {
  const Parts heads = parts_of(
      ops, [](const Append& op) { return op.kv_heads; },
      [](const Append& op) { return 4 * op.tokens * op.head_dim; });
  for_parts(pool, heads, [&](std::size_t op, std::size_t head) { append_head(ops[op], head); });
}

void run(ThreadPool& pool, std::span<const Attention> ops) {
  const auto rows_of = [](const Attention& op) {
    return op.heads == 0 ? 0 : op.heads / op.kv_heads * op.tokens;
  };
  std::size_t all = 0;
  for (const Attention& op : ops) all += op.kv_heads * rows_of(op);
  // Larger tiles read keys and values less often, and smaller ones give every thread some.
  const bool is_shared = all >= kAttentionRows * pool.size();
  const std::size_t most = is_shared ? kAttentionRows : kAttentionRows / 2;
  const auto tiles_of = [&](const Attention& op) { return (rows_of(op) + most - 1) / most; };
  const Parts tiles = parts_of(
      ops, [&](const Attention& op) { return op.kv_heads * tiles_of(op); },
      [](const Attention& op) {
        const std::size_t length = length_of(op);
        const std::size_t seen = op.window ? std::min(*op.window + op.tokens, length) : length;
        return 2 * seen * op.head_dim;
      });
  for_parts(pool, tiles, [&](std::size_t number, std::size_t tile) {
    const Attention& op = ops[number];
    const std::size_t first = tile % tiles_of(op) * most;
    attend_tile(op, tile / tiles_of(op), first, std::min(rows_of(op), first + most));
  });
}

}  // namespace entrollm
