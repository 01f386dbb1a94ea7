// Products with group scales in double precision, for group sizes that no kernel takes and for
// symbols that stand for values of a table.
#pragma once

#include <cstddef>

#include "product/activations.hpp"
#include "product/grouped.hpp"

namespace entrollm {

// y[b * stride + i] for each row i and vector b. Throws CorruptBlock when a block does not decode.
void multiply_by_segments(ThreadPool& pool, const GroupedMatrix& matrix, const Activations& x,
                          float* y, std::size_t stride);

}  // namespace entrollm
