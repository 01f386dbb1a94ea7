// Activation vectors as balanced base-256 digits, ready for int8 products.
#pragma once

#include <algorithm>
#include <bit>
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
  // Vectors one behind the other; the same, and at most kMostFlatVectors also side by side; or
  // groups of vectors for products of panels.
  enum class Layout { kRows, kSideBySide, kDigitGroups };

  // Multiplies each row by column_scale, if given, and rounds it to 16 bits of its largest
  // magnitude.
  Activations(ThreadPool& pool, const ActivationRows& rows, Layout layout);

  std::size_t batch() const { return scales_.size(); }

  // Of all but Layout::kDigitGroups: one activation vector from a column on.
  Digits digits(std::size_t row, std::size_t column) const {
    const std::size_t at = row * padded_;
    return Digits{high_.data() + at, low_.data() + at, whole_.data() + at, sums(row)}.from(column);
  }

  // Of Layout::kSideBySide: 1, 2, 4 or 8 columns, those past the batch being zero.
  std::size_t columns() const { return std::bit_ceil(batch()); }

  // Likewise: the vectors from `first` on, a multiple of kFlatGroup, and 1, 2 or 4 columns of their
  // digits; see CascadeRun too.
  FlatVectors group(std::size_t first) const {
    return {interleaved_.data() + first * 2 * padded_,
            std::bit_ceil(std::min(kFlatGroup, batch() - first))};
  }

  // Likewise, whole: (padded columns, columns()). Null before interleave_whole().
  const std::int16_t* interleaved_whole() const {
    return columns() == 1 ? whole_.data() : interleaved_whole_.data();
  }
  void interleave_whole(ThreadPool& pool);

  // Of Layout::kDigitGroups: the groups from `group` on; see kDigitGroup.
  const std::int8_t* digit_groups(std::size_t group) const {
    return high_.data() + group * (padded_ / kVector) * kPanelStep;
  }

  double scale(std::size_t row) const { return scales_[row]; }
  const double* scales() const { return scales_.data(); }
  std::int64_t sum(std::size_t row) const { return sums(row)[padded_ / kVector]; }

 private:
  struct Buffers {
    std::int16_t* whole;
    std::int8_t* high;
    std::int8_t* low;
  };
  void fill_row(const ActivationRows& rows, std::size_t row, const Buffers& out);
  void interleave(ThreadPool& pool);
  template <class Body>
  void for_columns(ThreadPool& pool, const Body& body) const;
  void fill_digit_group(const ActivationRows& rows, std::size_t group);
  const std::int64_t* sums(std::size_t row) const {
    return sums_.data() + row * (padded_ / kVector + 1);
  }

  std::size_t padded_;
  AlignedArray<std::int8_t> high_;  // or the digit groups
  AlignedArray<std::int8_t> low_;
  AlignedArray<std::int16_t> whole_;
  AlignedArray<std::int8_t> interleaved_;
  AlignedArray<std::int16_t> interleaved_whole_{0};
  std::vector<double> scales_;
  // (batch, padded / kVector + 1): the sums of the rounded integers before each vector, and of all.
  std::vector<std::int64_t> sums_;
};

}  // namespace entrollm
