// Products of matrices, coded or flat, with activations.
#pragma once

#include <cstddef>
#include <span>
#include <variant>

#include "product/flat_matrix.hpp"
#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

using AnyMatrix = std::variant<const CodedMatrix*, const FlatMatrix*>;

// y[b, :] = the products of all matrices with x[b, :], side by side.
//
// x is (batch, columns) and y (batch, sum of rows), both row-major; all matrices have the same
// number of columns. Activations are rounded to 16 bits of each vector's largest magnitude; sums
// are exact integers, so that results do not depend on the batch, the threads, the instruction set
// or the form of a matrix. Throws CorruptBlock when a block does not decode.
void multiply(ThreadPool& pool, std::span<const AnyMatrix> matrices, const float* x,
              std::size_t batch, float* y);

}  // namespace entrollm
