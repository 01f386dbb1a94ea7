// Products of coded matrices whose scales belong to groups of columns.
#pragma once

#include <cstddef>
#include <span>

#include "gemv/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// Column j is in group g = j / size: W[i, j] = symbol[i, j] * scale[i, g] + shift[i, g].
struct GroupTerms {
  std::size_t size;              // at least 1
  std::span<const float> scale;  // (rows, groups)
  std::span<const float> shift;  // likewise, or empty
};

// y[b, :] = W x[b, :], x being (batch, columns) and y (batch, rows), both row-major.
//
// Activations are rounded as for `multiply`; sums over a group are exact integers, those over
// groups are in double precision and in order, so that results do not depend on the batch, the
// threads or the instruction set. Throws CorruptBlock when a block does not decode, and
// std::invalid_argument when the terms do not fit the matrix.
void multiply_grouped(ThreadPool& pool, const CodedMatrix& matrix, const GroupTerms& terms,
                      const float* x, std::size_t batch, float* y);

}  // namespace entrollm
