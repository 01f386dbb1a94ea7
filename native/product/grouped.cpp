#include "product/grouped.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "codec/decode.hpp"
#include "product/activations.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kTasksPerThread = 8;

// This many products of a symbol and a rounded activation fit a 32-bit sum: 255 * 32639 * 256 <
// 2^31.
constexpr std::size_t kRun = 256;

// The columns [begin, end) that one scale group has in one part of a row block.
struct Segment {
  std::size_t begin;
  std::size_t end;
  std::size_t scale_group;
  bool is_aligned;  // whole vectors, if the zeros after the last column are counted
};

// The exact product. Compilers vectorize this simple loop.
std::int64_t dot_short(const std::uint8_t* weights, const std::int16_t* x, std::size_t count) {
  std::int64_t total = 0;
  for (std::size_t begin = 0; begin < count; begin += kRun) {
    const std::size_t end = std::min(count, begin + kRun);
    std::int32_t sum = 0;
    for (std::size_t i = begin; i < end; ++i) sum += std::int32_t{weights[i]} * x[i];
    total += sum;
  }
  return total;
}

// The product with values from a table. Four sums are independent, because an addition takes longer
// than it takes to start the next one.
double dot_table(const std::uint8_t* weights, const float* values, const std::int16_t* x,
                 std::size_t count) {
  double sums[4] = {};
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (std::size_t k = 0; k < 4; ++k) sums[k] += double{values[weights[i + k]]} * x[i + k];
  }
  for (; i < count; ++i) sums[0] += double{values[weights[i]]} * x[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

class GroupedProduct {
 public:
  GroupedProduct(const CodedMatrix& matrix, const GroupTerms& terms, const Activations& x, float* y)
      : matrix_(matrix), geometry_(matrix.geometry()), terms_(terms), x_(x), y_(y) {
    scale_groups_ = (geometry_.columns + terms.size - 1) / terms.size;
    cut();
    if (!terms.shift.empty()) add_up();
  }

  // Multiplies row blocks [begin, end). Returns false if a block does not decode.
  bool run(std::size_t begin, std::size_t end, std::size_t& bad_block) const {
    const std::size_t batch = x_.batch();
    DecodeScratch& scratch = thread_scratch(matrix_.code_, matrix_.max_block());
    std::vector<double> sums;
    for (std::size_t row_block = begin; row_block < end; ++row_block) {
      const std::size_t rows = geometry_.rows_in(row_block);
      sums.assign(rows * batch, 0.0);
      for (std::size_t part = 0; part < geometry_.parts(); ++part) {
        if (!matrix_.decode_part(row_block, part, scratch)) {
          bad_block = row_block * geometry_.parts() + part;
          return false;
        }
        multiply_part(row_block * geometry_.block_rows, rows, part, scratch.block(), sums.data());
      }
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t b = 0; b < batch; ++b) {
          y_[b * geometry_.rows + row_block * geometry_.block_rows + row] =
              static_cast<float>(sums[row * batch + b] * x_.scale(b));
        }
      }
    }
    return true;
  }

 private:
  // Divides the columns into segments, at the ends of scale groups and of parts.
  void cut() {
    for (std::size_t part = 0; part < geometry_.parts(); ++part) {
      first_segment_.push_back(segments_.size());
      std::size_t at = part * geometry_.block_columns;
      const std::size_t stop = std::min(geometry_.columns, at + geometry_.columns_in(part));
      while (at < stop) {
        const std::size_t scale_group = at / terms_.size;
        const std::size_t end = std::min(stop, (scale_group + 1) * terms_.size);
        const bool whole = end % kVector == 0 || end == geometry_.columns;
        segments_.push_back({at, end, scale_group, at % kVector == 0 && whole});
        at = end;
      }
    }
    first_segment_.push_back(segments_.size());
  }

  // Adds up each vector's rounded activations over each segment.
  void add_up() {
    x_sums_.resize(x_.batch() * segments_.size());
    for (std::size_t b = 0; b < x_.batch(); ++b) {
      const std::int16_t* x = x_.digits(b, 0).whole;
      for (std::size_t i = 0; i < segments_.size(); ++i) {
        std::int64_t sum = 0;
        for (std::size_t j = segments_[i].begin; j < segments_[i].end; ++j) sum += x[j];
        x_sums_[b * segments_.size() + i] = static_cast<double>(sum);
      }
    }
  }

  void multiply_part(std::size_t first_row, std::size_t rows, std::size_t part,
                     const std::uint8_t* block, double* sums) const {
    const std::size_t batch = x_.batch();
    const std::size_t width = geometry_.columns_in(part);
    const std::size_t first_column = part * geometry_.block_columns;
    for (std::size_t row = 0; row < rows; ++row) {
      const std::uint8_t* weights = block + row * width - first_column;
      const std::size_t terms_at = (first_row + row) * scale_groups_;
      for (std::size_t i = first_segment_[part]; i < first_segment_[part + 1]; ++i) {
        const Segment& segment = segments_[i];
        const double scale = terms_.scale[terms_at + segment.scale_group];
        const double shift =
            terms_.shift.empty() ? 0.0 : double{terms_.shift[terms_at + segment.scale_group]};
        double* row_sums = sums + row * batch;
        dot(segment, weights + segment.begin, [&](std::size_t b, double product) {
          row_sums[b] += scale * product;
          if (!terms_.shift.empty()) row_sums[b] += shift * x_sums_[b * segments_.size() + i];
        });
      }
    }
  }

  // Calls take(b, product) with the product of a segment's weights and each vector b.
  template <class Take>
  void dot(const Segment& segment, const std::uint8_t* weights, const Take& take) const {
    const std::size_t batch = x_.batch();
    const std::size_t count = segment.end - segment.begin;
    if (!terms_.values.empty() || !segment.is_aligned) {
      for (std::size_t b = 0; b < batch; ++b) {
        const std::int16_t* x = x_.digits(b, 0).whole + segment.begin;
        take(b, terms_.values.empty() ? static_cast<double>(dot_short(weights, x, count))
                                      : dot_table(weights, terms_.values.data(), x, count));
      }
      return;
    }
    const Kernels& isa = kernels();
    const std::size_t padded = (count + kVector - 1) / kVector * kVector;
    std::size_t b = 0;
    for (; b + kColumnTile <= batch; b += kColumnTile) {
      Digits x[kColumnTile];
      std::int64_t products[kColumnTile];
      for (std::size_t k = 0; k < kColumnTile; ++k) x[k] = x_.digits(b + k, segment.begin);
      isa.dot_tile(weights, x, padded, products);
      for (std::size_t k = 0; k < kColumnTile; ++k) take(b + k, static_cast<double>(products[k]));
    }
    for (; b < batch; ++b) {
      take(b, static_cast<double>(isa.dot(weights, x_.digits(b, segment.begin), padded)));
    }
  }

  const CodedMatrix& matrix_;
  const Geometry& geometry_;
  const GroupTerms& terms_;
  const Activations& x_;
  float* y_;
  std::size_t scale_groups_ = 0;
  std::vector<Segment> segments_;
  std::vector<std::size_t> first_segment_;  // of each part, and the end
  std::vector<double> x_sums_;              // (batch, segments)
};

void multiply_grouped(ThreadPool& pool, const CodedMatrix& matrix, const GroupTerms& terms,
                      const float* x, std::size_t batch, float* y) {
  const Geometry& geometry = matrix.geometry();
  if (terms.size == 0) throw std::invalid_argument("groups must have columns");
  const std::size_t scale_groups = (geometry.columns - 1) / terms.size + 1;
  const std::size_t expected = geometry.rows * scale_groups;
  if (terms.scale.size() != expected || (!terms.shift.empty() && terms.shift.size() != expected)) {
    throw std::invalid_argument("there must be a scale for each row and group");
  }
  if (!terms.values.empty() && terms.values.size() != 256) {
    throw std::invalid_argument("there must be a value for each symbol");
  }
  const Activations activations(
      pool, ActivationRows{x, batch, geometry.columns, geometry.padded_columns(), {}},
      Activations::Layout::kRows);
  const GroupedProduct product(matrix, terms, activations, y);
  const std::size_t row_blocks = geometry.row_blocks();
  const std::size_t count =
      std::min(row_blocks, pool.size() == 1 ? std::size_t{1} : pool.size() * kTasksPerThread);
  std::atomic<std::size_t> corrupt{SIZE_MAX};
  pool.run(count, [&](std::size_t task, std::size_t) {
    std::size_t bad_block = 0;
    if (!product.run(row_blocks * task / count, row_blocks * (task + 1) / count, bad_block)) {
      corrupt = bad_block;
    }
  });
  if (corrupt != SIZE_MAX) throw_corrupt(corrupt);
}

}  // namespace entrollm
