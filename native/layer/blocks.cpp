#include "layer/blocks.hpp"

#include <memory>
#include <stdexcept>
#include <vector>

namespace entrollm {
namespace {

using Buffer = std::unique_ptr<float[]>;

Buffer new_buffer(std::size_t size) { return Buffer(new float[size]); }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const Surroundings& around, std::size_t features) {
  for (const auto& norm : {around.norm, around.output_norm}) {
    require(norm.empty() || norm.size() == features,
            "a norm should have a weight for each feature");
  }
}

void normalise(ThreadPool& pool, const float* x, std::size_t rows, std::span<const float> weight,
               float eps, float* out) {
  const std::size_t features = weight.size();
  run(pool, RmsNorm{x, rows, features, weight.data(), 1, features, eps, out});
}

// x, or what the first norm makes of it in the buffer.
const float* enter(ThreadPool& pool, const Surroundings& around, const float* x, std::size_t rows,
                   Buffer& buffer) {
  if (around.norm.empty()) return x;
  buffer = new_buffer(rows * around.norm.size());
  normalise(pool, x, rows, around.norm, around.eps, buffer.get());
  return buffer.get();
}

// Turns a part's output into the block's, in place.
void leave(ThreadPool& pool, const Surroundings& around, const float* x, std::size_t rows,
           std::size_t features, float* y) {
  if (!around.output_norm.empty()) {
    normalise(pool, y, rows, around.output_norm, around.eps, y);
  }
  const std::size_t size = rows * features;
  if (around.scale) {
    for (std::size_t i = 0; i < size; ++i) y[i] *= *around.scale;
  }
  for (std::size_t i = 0; i < size; ++i) y[i] += x[i];
}

}  // namespace

AttentionBlock::AttentionBlock(const JoinedProduct& qkv, const JoinedProduct& output,
                               const Surroundings& surroundings, const AttentionShape& shape,
                               const QueryKeyNorms& norms)
    : qkv_(qkv), output_(output), surroundings_(surroundings), shape_(shape), norms_(norms) {
  require(shape.kv_heads > 0 && shape.head_dim > 0 && shape.heads % shape.kv_heads == 0,
          "heads should be a multiple of kv_heads");
  require(qkv.outputs() == shape.width() && output.inputs() == shape.heads * shape.head_dim &&
              output.outputs() == qkv.inputs(),
          "the products do not fit the heads");
  require(norms.heads.empty() || norms.heads.size() == shape.rotated(),
          "a norm of heads should have a weight for each feature of queries and keys");
  require((norms.queries.empty() && norms.keys.empty()) ||
              (norms.queries.size() == shape.heads * shape.head_dim &&
               norms.keys.size() == shape.kv_heads * shape.head_dim),
          "norms of queries and keys should have a weight for each feature");
  check(surroundings, features());
}

void AttentionBlock::run(ThreadPool& pool, const float* x, std::size_t rows,
                         const RowAngles& angles, std::span<const SequenceCache> sequences,
                         float* y) const {
  const std::size_t wide = shape_.heads * shape_.head_dim;
  Buffer normalised;
  const float* entered = enter(pool, surroundings_, x, rows, normalised);
  const Buffer qkv = new_buffer(rows * shape_.width());
  qkv_.run(pool, entered, rows, qkv.get());
  prepare_queries(pool, qkv.get(), rows, angles);
  const Buffer mixed = new_buffer(rows * wide);
  attend(pool, qkv.get(), sequences, mixed.get());
  output_.run(pool, mixed.get(), rows, y);
  leave(pool, surroundings_, x, rows, features(), y);
}

void AttentionBlock::prepare_queries(ThreadPool& pool, float* qkv, std::size_t rows,
                                     const RowAngles& angles) const {
  const std::size_t heads = shape_.heads, dim = shape_.head_dim, width = shape_.width();
  const std::size_t wide = heads * dim, rotated = heads + shape_.kv_heads;
  const float eps = surroundings_.eps;
  if (!norms_.heads.empty()) {
    ::entrollm::run(
        pool, RmsNorm{qkv, rows * rotated, dim, norms_.heads.data(), rotated, width, eps, qkv});
  } else if (!norms_.queries.empty()) {
    ::entrollm::run(pool, RmsNorm{qkv, rows, wide, norms_.queries.data(), 1, width, eps, qkv});
    ::entrollm::run(pool, RmsNorm{qkv + wide, rows, norms_.keys.size(), norms_.keys.data(), 1,
                                  width, eps, qkv + wide});
  }
  if (angles.cosines != nullptr) {
    ::entrollm::run(
        pool, Rotation{qkv, rows, width, rotated, dim, angles.cosines, angles.sines, angles.half});
  }
  for (std::size_t row = 0; row < rows; ++row) {
    float* queries = qkv + row * width;
    if (shape_.query_factor) {
      for (std::size_t i = 0; i < wide; ++i) queries[i] *= *shape_.query_factor;
    }
    if (angles.query_factors != nullptr) {
      for (std::size_t i = 0; i < wide; ++i) queries[i] *= angles.query_factors[row];
    }
  }
}

void AttentionBlock::attend(ThreadPool& pool, const float* qkv,
                            std::span<const SequenceCache> sequences, float* out) const {
  const std::size_t width = shape_.width(), dim = shape_.head_dim, heads = shape_.heads;
  std::vector<Append> appends;
  std::vector<Attention> attentions;
  for (const auto& [tokens, cache, window, earlier] : sequences) {
    appends.push_back(
        {qkv + heads * dim, qkv + shape_.rotated(), tokens, width, shape_.kv_heads, dim, cache});
    attentions.push_back(
        {qkv, tokens, width, heads, dim, shape_.kv_heads, cache, window, out, earlier});
    qkv += tokens * width;
    out += tokens * heads * dim;
  }
  ::entrollm::run(pool, appends);
  ::entrollm::run(pool, attentions);
}

FeedForwardBlock::FeedForwardBlock(const JoinedProduct& up, const JoinedProduct& down,
                                   const Surroundings& surroundings, Gate gate)
    : up_(up), down_(down), surroundings_(surroundings), gate_(gate) {
  require(up.outputs() == 2 * down.inputs() && down.outputs() == up.inputs(),
          "the products do not fit each other");
  check(surroundings, features());
}

void FeedForwardBlock::run(ThreadPool& pool, const float* x, std::size_t rows, float* y) const {
  const std::size_t inner = down_.inputs();
  Buffer normalised;
  const float* entered = enter(pool, surroundings_, x, rows, normalised);
  const Buffer gates = new_buffer(rows * up_.outputs()), gated = new_buffer(rows * inner);
  up_.run(pool, entered, rows, gates.get());
  ::entrollm::run(pool, GatedUnits{gates.get(), rows, inner, gate_, gated.get()});
  down_.run(pool, gated.get(), rows, y);
  leave(pool, surroundings_, x, rows, features(), y);
}

}  // namespace entrollm
