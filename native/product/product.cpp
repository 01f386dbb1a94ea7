#include "product/product.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "product/coded_product.hpp"
#include "product/flat_product.hpp"

namespace entrollm {
namespace {

// Tasks per thread: the last ones to finish should be short.
constexpr std::size_t kTasksPerThread = 8;

const Scales& scales_of(const AnyMatrix& matrix) {
  return std::visit([](const auto* m) -> const Scales& { return m->scales(); }, matrix);
}

std::size_t rows_of(const AnyMatrix& matrix) {
  return std::visit([](const auto* m) { return m->geometry().rows; }, matrix);
}

const Geometry& geometry_of(const AnyMatrix& matrix) {
  return std::visit([](const auto* m) -> const Geometry& { return m->geometry(); }, matrix);
}

// The activations of some matrices: those without column scales share one rounding.
class SharedActivations {
 public:
  SharedActivations(ThreadPool& pool, std::span<const AnyMatrix> matrices, const float* x,
                    std::size_t batch)
      : pool_(pool), x_(x), batch_(batch) {
    made_.reserve(matrices.size());
  }

  const Activations& of(const AnyMatrix& matrix) {
    const bool is_flat = std::holds_alternative<const FlatMatrix*>(matrix);
    const Scales& scales = scales_of(matrix);
    const bool own = !scales.column_scale.empty();
    if (own || shared_ == nullptr) {
      const Geometry& geometry = geometry_of(matrix);
      made_.emplace_back(pool_,
                         ActivationRows{x_, batch_, geometry.columns, geometry.padded_columns(),
                                        scales.column_scale},
                         layout());
      if (!own) shared_ = &made_.back();
    }
    Activations& found = own ? made_.back() : *shared_;
    if (is_flat && layout() == Activations::Layout::kSideBySide) found.interleave_whole(pool_);
    return found;
  }

 private:
  Activations::Layout layout() const {
    if (uses_panels(batch_)) return Activations::Layout::kDigitGroups;
    return batch_ <= kMostFlatVectors ? Activations::Layout::kSideBySide
                                      : Activations::Layout::kRows;
  }

  ThreadPool& pool_;
  const float* x_;
  const std::size_t batch_;
  std::vector<Activations> made_;
  Activations* shared_ = nullptr;
};

std::unique_ptr<MatrixProduct> make_product(const AnyMatrix& matrix, const Activations& x,
                                            const OutputRows& out) {
  if (const auto* flat = std::get_if<const FlatMatrix*>(&matrix)) {
    return std::make_unique<FlatProduct>(**flat, x, out);
  }
  return std::make_unique<CodedProduct>(*std::get<const CodedMatrix*>(matrix), x, out);
}

}  // namespace

void multiply(ThreadPool& pool, std::span<const AnyMatrix> matrices, const float* x,
              std::size_t batch, float* y) {
  std::size_t outputs = 0;
  for (const AnyMatrix& matrix : matrices) outputs += rows_of(matrix);
  SharedActivations activations(pool, matrices, x, batch);
  struct Task {
    const MatrixProduct* product;
    std::size_t begin;
    std::size_t end;
  };
  const std::size_t wanted = pool.size() == 1 ? 1 : pool.size() * kTasksPerThread;
  std::vector<std::unique_ptr<MatrixProduct>> products;
  std::vector<Task> tasks;
  std::size_t first_output = 0;
  for (const AnyMatrix& matrix : matrices) {
    products.push_back(make_product(matrix, activations.of(matrix), {y + first_output, outputs}));
    first_output += rows_of(matrix);
    const MatrixProduct* product = products.back().get();
    const std::size_t units = product->units();
    const std::size_t count = std::min(units, (wanted - 1) / matrices.size() + 1);
    for (std::size_t i = 0; i < count; ++i) {
      tasks.push_back({product, units * i / count, units * (i + 1) / count});
    }
  }
  std::atomic<std::size_t> corrupt{kNoBlock};
  pool.run(tasks.size(), [&](std::size_t task, std::size_t) {
    const Task& work = tasks[task];
    const std::size_t block = work.product->run(work.begin, work.end);
    if (block != kNoBlock) corrupt = block;
  });
  if (corrupt != kNoBlock) throw_corrupt(corrupt);
}

}  // namespace entrollm
