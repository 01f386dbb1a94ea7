// Products of coded matrices with activations.
#pragma once

#include <cstddef>
#include <span>

#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// y[b, :] = the products of all matrices with x[b, :], side by side.
//
// x is (batch, columns) and y (batch, sum of rows), both row-major; all matrices have the same
// number of columns. Activations are rounded to 16 bits of each vector's largest magnitude. Sums
// are exact integers, so that results do not depend on the batch, the threads or the instruction
// set. Throws CorruptBlock if a block does not decode.
void multiply(ThreadPool& pool, std::span<const CodedMatrix* const> matrices, const float* x,
              std::size_t batch, float* y);

}  // namespace entrollm
