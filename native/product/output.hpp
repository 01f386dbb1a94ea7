// Exact sums become outputs: y = (scale * sum + offset * sum of activations) * their scale, in the
// same steps whatever form the matrix has, so that results are equal bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product/activations.hpp"
#include "product/matrix.hpp"

namespace entrollm {

// Where the outputs of one matrix go: rows of `stride` floats, one for each activation vector.
struct OutputRows {
  float* y;
  std::size_t stride;
};

// Sums by row, and how many a row has.
struct RowSums {
  const std::int64_t* data;
  std::size_t stride;
};

class Output {
 public:
  Output(const Scales& scales, const Activations& x, const OutputRows& out)
      : scales_(scales), x_(x), out_(out) {}

  // Scales and writes the sums of `rows` rows with vectors [first, first + batch), the first ones
  // of each row.
  void write(std::size_t first_row, std::size_t rows, const RowSums& sums, std::size_t first,
             std::size_t batch) const;

  // The same for a product of panels; `first` is a multiple of kDigitGroup.
  void write_panels(const PanelProduct& product, std::size_t first_row, std::size_t first) const;

 private:
  // Scales and writes up to eight sums of each row, with the vectors from `first` on.
  void write_eight(SumScaling& scaling, std::size_t first_row, std::size_t first) const;

  const Scales& scales_;
  const Activations& x_;
  const OutputRows out_;
};

}  // namespace entrollm
