#include "product/grouped_by_segments.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "codec/decode.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kTasksPerThread = 8;
constexpr std::size_t kNoBlock = SIZE_MAX;

// Products of a symbol and a rounded activation that 32 bits can add up: 255 * 32639 * 256 < 2^31.
constexpr std::size_t kRun = 256;

// A simple loop, which compilers vectorize.
double dot_symbols(const std::uint8_t* weights, const std::int16_t* x, std::size_t count) {
  std::int64_t total = 0;
  for (std::size_t begin = 0; begin < count; begin += kRun) {
    const std::size_t end = std::min(count, begin + kRun);
    std::int32_t sum = 0;
    for (std::size_t i = begin; i < end; ++i) sum += std::int32_t{weights[i]} * x[i];
    total += sum;
  }
  return static_cast<double>(total);
}

// Four sums side by side, since an addition takes longer than it takes to start the next.
double dot_values(const std::uint8_t* weights, const float* values, const std::int16_t* x,
                  std::size_t count) {
  double sums[4] = {};
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (std::size_t k = 0; k < 4; ++k) sums[k] += double{values[weights[i + k]]} * x[i + k];
  }
  for (; i < count; ++i) sums[0] += double{values[weights[i]]} * x[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Calls `take(begin, end, group)` for the columns of each group in [begin, end).
template <class Take>
void for_segments(std::size_t begin, std::size_t end, std::size_t size, const Take& take) {
  while (begin < end) {
    const std::size_t group = begin / size;
    const std::size_t stop = std::min(end, (group + 1) * size);
    take(begin, stop, group);
    begin = stop;
  }
}

class SegmentedProduct {
 public:
  SegmentedProduct(const GroupedMatrix& matrix, const Activations& x, float* y, std::size_t stride)
      : matrix_(matrix), geometry_(matrix.geometry()), x_(x), y_(y), stride_(stride) {}

  std::size_t run(std::size_t begin, std::size_t end) const {
    std::vector<double> sums;
    std::vector<float> scale, shift, spare;
    std::size_t last_row = SIZE_MAX;
    return matrix_.coded().for_blocks(begin, end, [&](const DecodedBlock& block) {
      const std::size_t groups = matrix_.scales().terms.groups;
      if (block.first_row != last_row) {
        last_row = block.first_row;
        sums.assign(block.rows * x_.batch(), 0.0);
        scale.assign(block.rows * groups, 0.0f);
        shift.assign(block.rows * groups, 0.0f);
        spare.resize(block.rows * groups);
        kernels().grouped->terms(matrix_.scales().terms, last_row, block.rows, scale.data(),
                                 shift.data(), spare.data());
      }
      const std::size_t end_column =
          std::min(geometry_.columns, block.first_column + block.columns);
      for (std::size_t row = 0; row < block.rows; ++row) {
        add(block, row, end_column, {scale.data() + row * groups, shift.data() + row * groups},
            sums.data() + row * x_.batch());
      }
      if (end_column < geometry_.columns) return;
      for (std::size_t row = 0; row < block.rows; ++row) {
        for (std::size_t b = 0; b < x_.batch(); ++b) {
          y_[b * stride_ + block.first_row + row] =
              static_cast<float>(sums[row * x_.batch() + b] * x_.scale(b));
        }
      }
    });
  }

 private:
  struct RowTerms {
    const float* scale;
    const float* shift;
  };

  void add(const DecodedBlock& block, std::size_t row, std::size_t end_column,
           const RowTerms& terms, double* sums) const {
    const GroupScales& scales = matrix_.scales();
    const std::uint8_t* weights = block.symbols + row * block.columns - block.first_column;
    for_segments(block.first_column, end_column, scales.size,
                 [&](std::size_t begin, std::size_t end, std::size_t group) {
                   for (std::size_t b = 0; b < x_.batch(); ++b) {
                     const std::int16_t* x = x_.digits(b, 0).whole + begin;
                     const std::size_t count = end - begin;
                     const double product =
                         scales.values.empty()
                             ? dot_symbols(weights + begin, x, count)
                             : dot_values(weights + begin, scales.values.data(), x, count);
                     sums[b] += double{terms.scale[group]} * product;
                     if (!scales.terms.has_shift()) continue;
                     std::int64_t sum = 0;
                     for (std::size_t i = 0; i < count; ++i) sum += x[i];
                     sums[b] += double{terms.shift[group]} * static_cast<double>(sum);
                   }
                 });
  }

  const GroupedMatrix& matrix_;
  const Geometry& geometry_;
  const Activations& x_;
  float* y_;
  std::size_t stride_;
};

}  // namespace

void multiply_by_segments(ThreadPool& pool, const GroupedMatrix& matrix, const Activations& x,
                          float* y, std::size_t stride) {
  const SegmentedProduct product(matrix, x, y, stride);
  const std::size_t units = matrix.geometry().row_blocks();
  const std::size_t tasks =
      std::min(units, pool.size() == 1 ? std::size_t{1} : pool.size() * kTasksPerThread);
  std::atomic<std::size_t> corrupt{kNoBlock};
  pool.run(tasks, [&](std::size_t task, std::size_t) {
    const std::size_t bad = product.run(units * task / tasks, units * (task + 1) / tasks);
    if (bad != kNoBlock) corrupt = bad;
  });
  if (corrupt != kNoBlock) throw_corrupt(corrupt);
}

}  // namespace entrollm
