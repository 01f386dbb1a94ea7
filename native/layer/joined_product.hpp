// A product with several matrices at once and the bias that is added, prepared once for many calls.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "product/grouped.hpp"
#include "product/lossless.hpp"
#include "product/product.hpp"
#include "threads/pool.hpp"

namespace entrollm {

class JoinedProduct {
 public:
  using Matrices = std::variant<std::vector<AnyMatrix>, std::vector<const GroupedMatrix*>,
                                std::vector<const LosslessMatrix*>>;

  // The matrices, one at least and of as many columns each, must outlive the product, and so must
  // the bias, which is empty or has one entry for each output. Throws std::invalid_argument if
  // sizes differ.
  JoinedProduct(std::string name, Matrices matrices, std::span<const float> bias);

  std::size_t inputs() const { return inputs_; }
  std::size_t outputs() const { return outputs_; }

  // y[b, :] = the products of all matrices with x[b, :], side by side, plus the bias; x is (batch,
  // inputs) and y (batch, outputs). Throws CorruptBlock, which then has the product's name.
  void run(ThreadPool& pool, const float* x, std::size_t batch, float* y) const;

 private:
  std::string name_;
  Matrices matrices_;
  std::span<const float> bias_;
  std::size_t inputs_ = 0;
  std::size_t outputs_ = 0;
};

}  // namespace entrollm
