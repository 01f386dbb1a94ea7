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

// An array that begins a cache line: loads of 64 bytes then never straddle two.
template <class T>
class AlignedArray {
 public:
  explicit AlignedArray(std::size_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

class Activations {
 public:
  // Rounds each row of x (batch, columns), times column_scale when given, to 16 bits of the row's
  // largest magnitude. Rows are padded with zeros to `padded` columns, whole vectors.
  Activations(const float* x, std::size_t batch, std::size_t columns, std::size_t padded,
              std::span<const float> column_scale);

  std::size_t batch() const { return scales_.size(); }
  Digits digits(std::size_t row, std::size_t column) const {
    const std::size_t at = row * padded_;
    return Digits{high_.data() + at, low_.data() + at, whole_.data() + at, sums(row)}.from(column);
  }
  double scale(std::size_t row) const { return scales_[row]; }
  std::int64_t sum(std::size_t row) const { return sums(row)[padded_ / kVector]; }

 private:
  void fill_row(const float* x, std::size_t columns, std::size_t row);
  const std::int64_t* sums(std::size_t row) const {
    return sums_.data() + row * (padded_ / kVector + 1);
  }

  std::size_t padded_;
  AlignedArray<std::int8_t> high_;
  AlignedArray<std::int8_t> low_;
  AlignedArray<std::int16_t> whole_;
  std::vector<double> scales_;
  // Of the rounded integers before each vector, and of all: (batch, padded / kVector + 1).
  std::vector<std::int64_t> sums_;
};

}  // namespace entrollm
