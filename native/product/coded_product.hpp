// Products of matrices that are decoded on the way.
#pragma once

#include "product/matrix.hpp"
#include "product/matrix_product.hpp"

namespace entrollm {

class CodedProduct final : public MatrixProduct {
 public:
  // All must outlive the product.
  CodedProduct(const CodedMatrix& matrix, const Activations& x, const OutputRows& out);

  std::size_t units() const override { return (geometry_.row_blocks() - 1) / unit_ + 1; }
  std::size_t run(std::size_t begin, std::size_t end) const override;

 private:
  std::size_t run_fused(std::size_t begin, std::size_t end) const;
  std::size_t run_groups(std::size_t begin, std::size_t end) const;
  std::size_t run_panels(std::size_t begin, std::size_t end) const;
  std::size_t run_tiles(std::size_t begin, std::size_t end) const;
  std::size_t run_batch(std::size_t begin, std::size_t end, std::size_t first,
                        std::size_t batch) const;
  std::size_t decode_panels(std::size_t begin, std::size_t end, std::uint8_t* panels) const;
  void copy_to_panels(const std::uint8_t* block, std::size_t first_row, std::size_t rows,
                      std::size_t part, std::uint8_t* panels) const;

  // Row groups to decode at a time, of about `rows` rows.
  std::size_t groups_of(std::size_t rows) const {
    return std::max<std::size_t>(1, rows / geometry_.block_rows);
  }
  std::size_t row_vectors() const { return geometry_.padded_columns() / kVector; }

  const CodedMatrix& matrix_;
  const Geometry& geometry_;
  const Activations& x_;
  const Output output_;
  const std::size_t unit_;  // row groups that are best multiplied together
};

}  // namespace entrollm
