// Activation vectors as balanced base-256 digits, ready for int8 products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "kernels/kernels.hpp"
#include "threads/pool.hpp"

namespace entrollm {

// An array that begins at a cache line, so that aligned loads of 64 bytes touch one line only.
template <class T>
class AlignedArray {
 public:
  explicit AlignedArray(std::size_t size)
      : size_(size), data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::size_t size_;
  std::unique_ptr<T, Free> data_;
};

// The rows of x, (batch, columns), that are multiplied with a matrix.
struct ActivationRows {
  const float* x;
  std::size_t batch;
  std::size_t columns;
  std::size_t padded;                   // columns, rounded up to whole vectors with zeros
  std::span<const float> column_scale;  // may be empty
};

class Activations {
 public:
  enum class Layout { kRows, kDigitGroups };

  // Multiplies each row by column_scale, if given, and rounds it to 16 bits of its largest
  // magnitude.
  Activations(ThreadPool& pool, const ActivationRows& rows, Layout layout);

  std::size_t batch() const { return scales_.size(); }

  // One activation vector from a column on. Needs Layout::kRows.
  Digits digits(std::size_t row, std::size_t column) const {
    const std::size_t at = row * padded_;
    return Digits{high_.data() + at, low_.data() + at, whole_.data() + at, sums(row)}.from(column);
  }
  // The number of activation vectors, 1, 2 or 4, and their digits side by side as CascadeRun has
  // them. Needs Layout::kRows and at most kMostColumns rows.
  std::size_t columns() const { return batch() <= 2 ? batch() : kMostColumns; }
  const std::int8_t* interleaved() const { return interleaved_.data(); }

  // The digit groups from number `group` on. Needs Layout::kDigitGroups.
  const std::int8_t* digit_groups(std::size_t group) const {
    return high_.data() + group * (padded_ / kVector) * kPanelStep;
  }

  double scale(std::size_t row) const { return scales_[row]; }
  std::int64_t sum(std::size_t row) const { return sums(row)[padded_ / kVector]; }

 private:
  struct Buffers {
    std::int16_t* whole;
    std::int8_t* high;
    std::int8_t* low;
  };
  void fill_row(const ActivationRows& rows, std::size_t row, const Buffers& out);
  void interleave();
  void fill_digit_group(const ActivationRows& rows, std::size_t group);
  const std::int64_t* sums(std::size_t row) const {
    return sums_.data() + row * (padded_ / kVector + 1);
  }

  std::size_t padded_;
  AlignedArray<std::int8_t> high_;  // or the digit groups
  AlignedArray<std::int8_t> low_;
  AlignedArray<std::int16_t> whole_;
  AlignedArray<std::int8_t> interleaved_;
  std::vector<double> scales_;
  // (batch, padded / kVector + 1): the sums of the rounded integers before each vector, and of all.
  std::vector<std::int64_t> sums_;
};

}  // namespace entrollm
