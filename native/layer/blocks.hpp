// The two halves of a decoder layer, each of which adds to its input what a part makes of it. They
// do what the engine does in Python with the same operations in the same order, so that results
// are the same bits.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "layer/joined_product.hpp"
#include "ops/ops.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// What surrounds a part: y = x + part(norm(x)), where the output is normalised and multiplied too.
struct Surroundings {
  std::span<const float> norm;         // (features), or empty
  std::span<const float> output_norm;  // likewise
  float eps = 0.0f;
  std::optional<float> scale;
};

// How queries and keys are normalised before they are rotated; empty if they are not.
struct QueryKeyNorms {
  std::span<const float> heads;          // (heads + kv_heads, head_dim): each head on its own
  std::span<const float> queries, keys;  // or all heads of a kind over their whole width
};

struct AttentionShape {
  std::size_t heads;
  std::size_t kv_heads;  // divides heads
  std::size_t head_dim;
  std::optional<float> query_factor;

  std::size_t rotated() const { return (heads + kv_heads) * head_dim; }
  std::size_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// What is done to the queries and keys of each row.
struct RowAngles {
  const float* cosines;  // (rows, half); null if nothing is rotated
  const float* sines;
  std::size_t half;            // 2 * half is at most head_dim
  const float* query_factors;  // (rows); null for none
};

// The positions of a sequence. The keys and values of its new tokens, the last ones, are written
// here.
struct SequenceCache {
  std::size_t tokens;  // consecutive rows, at least 1
  CachedPositions cache;
  std::optional<std::size_t> window;
  std::vector<CachedPositions> earlier;
};

class AttentionBlock {
 public:
  // Throws std::invalid_argument if sizes do not fit together.
  AttentionBlock(const JoinedProduct& qkv, const JoinedProduct& output,
                 const Surroundings& surroundings, const AttentionShape& shape,
                 const QueryKeyNorms& norms);

  std::size_t features() const { return qkv_.inputs(); }
  const AttentionShape& shape() const { return shape_; }

  // x and y are (rows, features), rows being those of all sequences in turn, and y is another
  // array.
  void run(ThreadPool& pool, const float* x, std::size_t rows, const RowAngles& angles,
           std::span<const SequenceCache> sequences, float* y) const;

 private:
  void prepare_queries(ThreadPool& pool, float* qkv, std::size_t rows,
                       const RowAngles& angles) const;
  void attend(ThreadPool& pool, const float* qkv, std::span<const SequenceCache> sequences,
              float* out) const;

  const JoinedProduct& qkv_;
  const JoinedProduct& output_;
  const Surroundings surroundings_;
  const AttentionShape shape_;
  const QueryKeyNorms norms_;
};

class FeedForwardBlock {
 public:
  // `up` gives the gates and then what they multiply. Throws std::invalid_argument if sizes do not
  // fit together.
  FeedForwardBlock(const JoinedProduct& up, const JoinedProduct& down,
                   const Surroundings& surroundings, Gate gate);

  std::size_t features() const { return up_.inputs(); }

  // x and y are (rows, features), and y is another array.
  void run(ThreadPool& pool, const float* x, std::size_t rows, float* y) const;

 private:
  const JoinedProduct& up_;
  const JoinedProduct& down_;
  const Surroundings surroundings_;
  const Gate gate_;
};

}  // namespace entrollm
