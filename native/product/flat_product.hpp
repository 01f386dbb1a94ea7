// Products of flat matrices.
#pragma once

#include "product/flat_matrix.hpp"
#include "product/matrix_product.hpp"

namespace entrollm {

class FlatProduct final : public MatrixProduct {
 public:
  // All must outlive the product. Activations of up to kMostFlatVectors vectors are side by side,
  // whole ones too, unless products are of panels.
  FlatProduct(const FlatMatrix& matrix, const Activations& x, const OutputRows& out);

  std::size_t units() const override { return (matrix_.geometry().rows - 1) / unit_ + 1; }
  std::size_t run(std::size_t begin, std::size_t end) const override;

 private:
  // Rows [first, first + count) of the matrix, which begin at row `row` of their segment.
  struct Run {
    const FlatSegment& segment;
    std::size_t first;
    std::size_t row;
    std::size_t count;
  };

  template <class Body>
  void for_segments(std::size_t begin, std::size_t end, std::size_t most, const Body& body) const;
  void run_few(const Run& run) const;
  void fetch_patches(const Run& run) const;
  void add_bytes(const Run& run, std::int64_t* sums) const;
  void run_tile(const Run& run) const;
  void run_panels(std::size_t begin, std::size_t end) const;
  void unpack_panels(const Run& run, std::size_t at, std::uint8_t* panels) const;

  const FlatMatrix& matrix_;
  const Activations& x_;
  const Output output_;
  const std::size_t unit_;  // rows that are best multiplied together
};

}  // namespace entrollm
