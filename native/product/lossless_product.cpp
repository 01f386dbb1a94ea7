// Products of lossless matrices: a row block is decoded into the first-level cache and multiplied
// from there.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels/kernels.hpp"
#include "product/activations.hpp"
#include "product/lossless.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kTasksPerThread = 8;
// Activation vectors whose sums are finished together.
constexpr std::size_t kVectorsAtOnce = 8;
// Columns that fused products take in one stride, and rows whose lanes stay in the first-level
// cache.
constexpr std::size_t kEight = 8 * kVector;
constexpr std::size_t kFusedRows = 64;

// The rows of x, padded with zeros, each chunk in the order of the runs.
AlignedArray<float> in_order_of_runs(WordFormat format, const float* x, std::size_t batch,
                                     std::size_t columns, std::size_t padded) {
  // Fused products take 1, 2 or 4 vectors.
  const std::size_t room = batch <= kMostFusedLossless ? std::bit_ceil(batch) : batch;
  AlignedArray<float> ordered(room * padded);
  std::fill(ordered.data() + batch * padded, ordered.data() + room * padded, 0.0f);
  for (std::size_t b = 0; b < batch; ++b) {
    const float* from = x + b * columns;
    float* to = ordered.data() + b * padded;
    for (std::size_t chunk = 0; chunk < padded; chunk += kVector) {
      float last[kVector] = {};
      const std::size_t count = std::min(kVector, columns - chunk);
      if (count < kVector) std::memcpy(last, from + chunk, count * sizeof(float));
      const float* source = count < kVector ? last : from + chunk;
      for (std::size_t i = 0; i < kVector; ++i) {
        to[chunk + i] = source[lossless_column(format, i / kLosslessRun, i % kLosslessRun)];
      }
    }
  }
  return ordered;
}

// Adds the lanes in pairs: those that are half as far from the first as there are lanes, and so on.
float sum_lanes(const float* lanes) {
  float sums[kLosslessRun];
  for (std::size_t i = 0; i < kLosslessRun; ++i) sums[i] = lanes[i] + lanes[i + kLosslessRun];
  for (std::size_t width = kLosslessRun / 2; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) sums[i] = sums[i] + sums[i + width];
  }
  return sums[0];
}

// A thread's buffers, kept between products.
struct Buffers {
  std::vector<float> lanes;             // of the rows of a fused product
  std::vector<std::uint8_t> symbols;    // (rows of a row block, padded columns)
  std::vector<std::uint8_t> wide_high;  // of a row of words of 8 bits, like wide_low
  std::vector<std::uint8_t> wide_low;
};

Buffers& buffers() {
  thread_local Buffers found;
  return found;
}

// One matrix times the activations.
class LosslessProduct {
 public:
  LosslessProduct(const LosslessMatrix& matrix, const float* x, std::size_t batch, float* y,
                  std::size_t stride)
      : matrix_(matrix),
        geometry_(matrix.geometry()),
        x_(x),
        batch_(batch),
        y_(y),
        stride_(stride),
        add_(matrix.format() == WordFormat::kHalf ? kernels().lossless->add_half
                                                  : kernels().lossless->add_bfloat16),
        is_fused_(can_fuse()) {}

  std::size_t units() const { return geometry_.row_blocks(); }

  // Multiplies row blocks [begin, end). Returns a block that does not decode, or SIZE_MAX.
  std::size_t run(std::size_t begin, std::size_t end) const {
    return is_fused_ ? run_fused(begin, end) : run_blocks(begin, end);
  }

 private:
  bool can_fuse() const {
    const CodedMatrix& coded = matrix_.coded();
    return kernels().lossless->cascade_bfloat16 != nullptr && coded.has_cascade() &&
           coded.cascade().low_bits == 0 && coded.cascade().bits[0] <= kMostFusedRootBits &&
           matrix_.type() == FloatType::kBfloat16 && batch_ <= kMostFusedLossless &&
           geometry_.columns % kEight == 0 &&
           (geometry_.parts() == 1 || geometry_.block_columns % kEight == 0);
  }

  std::size_t run_fused(std::size_t begin, std::size_t end) const {
    std::vector<float>& lanes = buffers().lanes;
    const std::size_t vectors = std::bit_ceil(batch_);
    const std::size_t step = std::max<std::size_t>(1, kFusedRows / geometry_.block_rows);
    for (std::size_t from = begin; from < end; from += step) {
      const std::size_t to = std::min(end, from + step);
      const std::size_t first_row = from * geometry_.block_rows;
      const std::size_t rows = geometry_.rows_between(from, to);
      lanes.resize(rows * vectors * kLosslessLanes);
      const CascadeRun run = matrix_.coded().cascade_run(from, to);
      const std::size_t done = kernels().lossless->cascade_bfloat16(
          run, {matrix_.low(first_row), x_, geometry_.columns, vectors, lanes.data()});
      if (done != run.row_blocks * run.parts) return from * run.parts + done;
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t v = 0; v < batch_; ++v) {
          y_[v * stride_ + first_row + row] =
              sum_lanes(lanes.data() + (row * vectors + v) * kLosslessLanes);
        }
      }
    }
    return SIZE_MAX;
  }

  std::size_t run_blocks(std::size_t begin, std::size_t end) const {
    const std::size_t width = geometry_.padded_columns();
    std::vector<std::uint8_t>& symbols = buffers().symbols;
    if (symbols.size() < geometry_.block_rows * width) {
      symbols.resize(geometry_.block_rows * width);
    }
    for (std::size_t row_block = begin; row_block < end; ++row_block) {
      const std::size_t bad = matrix_.coded().decode_rows(row_block, symbols.data());
      if (bad != SIZE_MAX) return bad;
      for (std::size_t i = 0; i < geometry_.rows_in(row_block); ++i) {
        multiply_row(row_block * geometry_.block_rows + i, symbols.data() + i * width);
      }
    }
    return SIZE_MAX;
  }

  void multiply_row(std::size_t row, const std::uint8_t* high) const {
    const std::uint8_t* low = nullptr;
    if (has_low_bytes(matrix_.type())) {
      low = matrix_.low(row);
    } else {
      Buffers& own = buffers();
      own.wide_high.resize(geometry_.padded_columns());
      own.wide_low.resize(geometry_.padded_columns());
      matrix_.widen(high, geometry_.columns, own.wide_high.data(), own.wide_low.data());
      high = own.wide_high.data();
      low = own.wide_low.data();
    }
    const std::size_t chunks = geometry_.columns / kVector;
    const std::size_t done = chunks * kVector;
    const std::size_t left = geometry_.columns - done;
    // Weights past the last column are zeros: any others might not be finite.
    std::uint8_t last_high[kVector] = {}, last_low[kVector] = {};
    std::memcpy(last_high, high + done, left);
    std::memcpy(last_low, low + done, left);
    for (std::size_t first = 0; first < batch_; first += kVectorsAtOnce) {
      const std::size_t vectors = std::min(kVectorsAtOnce, batch_ - first);
      const std::size_t width = geometry_.padded_columns();
      const float* x = x_ + first * width;
      alignas(64) float lanes[kVectorsAtOnce * kLosslessLanes] = {};
      if (chunks != 0) add_({high, low, chunks, x, width, vectors, lanes});
      if (left != 0) add_({last_high, last_low, 1, x + done, width, vectors, lanes});
      for (std::size_t v = 0; v < vectors; ++v) {
        y_[(first + v) * stride_ + row] = sum_lanes(lanes + v * kLosslessLanes);
      }
    }
  }

  const LosslessMatrix& matrix_;
  const Geometry& geometry_;
  const float* x_;
  std::size_t batch_;
  float* y_;
  std::size_t stride_;
  void (*add_)(const LosslessRow& row);
  bool is_fused_;
};

}  // namespace

void multiply_lossless(ThreadPool& pool, std::span<const LosslessMatrix* const> matrices,
                       const float* x, std::size_t batch, float* y) {
  if (matrices.empty() || batch == 0) return;
  const Geometry& geometry = matrices.front()->geometry();
  std::size_t outputs = 0;
  bool has_format[2] = {};
  for (const LosslessMatrix* matrix : matrices) {
    if (matrix->geometry().columns != geometry.columns) {
      throw std::invalid_argument("matrices must have the same number of columns");
    }
    outputs += matrix->geometry().rows;
    has_format[static_cast<int>(matrix->format())] = true;
  }
  std::vector<AlignedArray<float>> ordered;
  for (const WordFormat format : {WordFormat::kBfloat16, WordFormat::kHalf}) {
    const std::size_t rows = has_format[static_cast<int>(format)] ? batch : 0;
    ordered.push_back(
        in_order_of_runs(format, x, rows, geometry.columns, geometry.padded_columns()));
  }
  std::vector<LosslessProduct> products;
  struct Task {
    std::size_t product;
    std::size_t begin;
    std::size_t end;
  };
  std::vector<Task> tasks;
  const std::size_t wanted = pool.size() == 1 ? 1 : pool.size() * kTasksPerThread;
  std::size_t first_output = 0;
  for (const LosslessMatrix* matrix : matrices) {
    products.emplace_back(*matrix, ordered[static_cast<std::size_t>(matrix->format())].data(),
                          batch, y + first_output, outputs);
    first_output += matrix->geometry().rows;
    const std::size_t units = products.back().units();
    const std::size_t count = std::min(units, (wanted - 1) / matrices.size() + 1);
    for (std::size_t i = 0; i < count; ++i) {
      tasks.push_back({products.size() - 1, units * i / count, units * (i + 1) / count});
    }
  }
  std::atomic<std::size_t> corrupt{SIZE_MAX};
  pool.run(tasks.size(), [&](std::size_t task, std::size_t) {
    const Task& work = tasks[task];
    const std::size_t bad = products[work.product].run(work.begin, work.end);
    if (bad != SIZE_MAX) corrupt = bad;
  });
  if (corrupt != SIZE_MAX) throw_corrupt(corrupt);
}

}  // namespace entrollm
