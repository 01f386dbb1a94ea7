// Products of coded matrices with group scales: the scales belong to groups of columns.
#pragma once

#include <cstddef>
#include <span>

#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// Column j is in scale group g = j / size: W[i, j] = value[i, j] * scale[i, g] + shift[i, g]. The
// value is the symbol, or values[symbol] if there are values.
struct GroupTerms {
  std::size_t size;               // columns of a scale group, at least 1
  std::span<const float> scale;   // (rows, scale groups)
  std::span<const float> shift;   // likewise, or empty
  std::span<const float> values;  // 256, or empty
};

// y[b, :] = W x[b, :], where x is (batch, columns) and y (batch, rows), both row-major.
//
// Activations are rounded as for `multiply`. Sums over a scale group are exact integers. Sums over
// scale groups, and those of values from a table, are in double precision and in a fixed order, so
// that results do not depend on the batch, the threads or the instruction set. Throws CorruptBlock
// if a block does not decode, and std::invalid_argument if the terms do not fit the matrix.
void multiply_grouped(ThreadPool& pool, const CodedMatrix& matrix, const GroupTerms& terms,
                      const float* x, std::size_t batch, float* y);

}  // namespace entrollm
