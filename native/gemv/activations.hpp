// Activation vectors as balanced base-256 digits, ready for int8 products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "isa/kernels.hpp"

namespace entrollm {

// Bytes that begin a cache line: loads of 64 bytes then never straddle two.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::size_t size)
      : data_(static_cast<std::int8_t*>(::operator new(size, kAlignment))) {}
  std::int8_t* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::int8_t* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::int8_t, Free> data_;
};

class Activations {
 public:
  // Rounds each row of x (batch, columns), times column_scale when given, to 16 bits of the row's
  // largest magnitude. Rows are padded with zeros to `padded` columns.
  Activations(const float* x, std::size_t batch, std::size_t columns, std::size_t padded,
              std::span<const float> column_scale);

  std::size_t batch() const { return scales_.size(); }
  Digits digits(std::size_t row, std::size_t column) const {
    const std::size_t at = row * padded_ + column;
    return {high_.data() + at, low_.data() + at};
  }
  double scale(std::size_t row) const { return scales_[row]; }
  std::int64_t sum(std::size_t row) const { return sums_[row]; }

 private:
  std::size_t padded_;
  AlignedBytes high_;
  AlignedBytes low_;
  std::vector<double> scales_;
  std::vector<std::int64_t> sums_;  // of the rounded integers
};

}  // namespace entrollm
