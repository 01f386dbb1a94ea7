#include "layer/joined_product.hpp"

#include <stdexcept>
#include <utility>

namespace entrollm {
namespace {

const Geometry& geometry_of(const AnyMatrix& matrix) {
  return std::visit([](const auto* m) -> const Geometry& { return m->geometry(); }, matrix);
}

template <class AnyNativeMatrix>
const Geometry& geometry_of(const AnyNativeMatrix* matrix) {
  return matrix->geometry();
}

// Which product takes which matrices.
struct Multiply {
  ThreadPool& pool;
  const float* x;
  std::size_t batch;
  float* y;

  void operator()(const std::vector<AnyMatrix>& all) const { multiply(pool, all, x, batch, y); }
  void operator()(const std::vector<const GroupedMatrix*>& all) const {
    multiply_grouped(pool, all, x, batch, y);
  }
  void operator()(const std::vector<const LosslessMatrix*>& all) const {
    multiply_lossless(pool, all, x, batch, y);
  }
};

}  // namespace

JoinedProduct::JoinedProduct(std::string name, Matrices matrices, std::span<const float> bias)
    : name_(std::move(name)), matrices_(std::move(matrices)), bias_(bias) {
  const auto measure = [&](const auto& all) {
    if (all.empty()) throw std::invalid_argument(name_ + ": a product needs a matrix");
    inputs_ = geometry_of(all.front()).columns;
    for (const auto& matrix : all) {
      if (geometry_of(matrix).columns != inputs_) {
        throw std::invalid_argument(name_ + ": matrices must have the same number of columns");
      }
      outputs_ += geometry_of(matrix).rows;
    }
  };
  std::visit(measure, matrices_);
  if (!bias_.empty() && bias_.size() != outputs_) {
    throw std::invalid_argument(name_ + ": there must be a bias for each output");
  }
}

void JoinedProduct::run(ThreadPool& pool, const float* x, std::size_t batch, float* y) const {
  try {
    std::visit(Multiply{pool, x, batch, y}, matrices_);
  } catch (const CorruptBlock& error) {
    throw CorruptBlock(name_ + ": " + error.what());
  }
  if (bias_.empty()) return;
  for (std::size_t row = 0; row < batch; ++row, y += outputs_) {
    for (std::size_t i = 0; i < outputs_; ++i) y[i] += bias_[i];
  }
}

}  // namespace entrollm
