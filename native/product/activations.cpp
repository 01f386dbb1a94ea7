#include "product/activations.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

namespace entrollm {
namespace {

// The largest magnitude whose two balanced digits both fit int8: 127 * 256 + 127.
constexpr float kLargest = 32639.0f;

constexpr std::int32_t kInfinity = 0x7f800000;

// Rows of a task that rounds activations.
constexpr std::size_t kTaskRows = 4;

// Elements of a batch below which one thread lays them out sooner than several.
constexpr std::size_t kSharedElements = 8192;

// Columns of one activation vector that lie side by side in a digit group.
constexpr std::size_t kRun = 4;

// Bytes of the high digits of `rows`, or of all their digits in digit groups.
std::size_t digit_bytes(const ActivationRows& rows, Activations::Layout layout) {
  if (layout != Activations::Layout::kDigitGroups) return rows.batch * rows.padded;
  return (rows.batch + kDigitGroup - 1) / kDigitGroup * (rows.padded / kVector) * kPanelStep;
}

// Bytes of the digits of all columns side by side.
std::size_t interleaved_bytes(const ActivationRows& rows, Activations::Layout layout) {
  return layout == Activations::Layout::kSideBySide ? std::bit_ceil(rows.batch) * 2 * rows.padded
                                                    : 0;
}

// Writes a vector's digits to its place in a digit group, where runs of four lie 64 bytes apart.
void spread(const std::int8_t* digits, std::size_t count, std::int8_t* out) {
  for (std::size_t i = 0; i < count; i += kRun, out += kVector) std::memcpy(out, digits + i, kRun);
}

// Writes columns [begin, end) of rows side by side: out is (columns, Rows).
template <std::size_t Rows>
void transpose(const std::int16_t* const* rows, std::size_t begin, std::size_t end,
               std::int16_t* out) {
  for (std::size_t at = begin; at < end; ++at) {
    for (std::size_t row = 0; row < Rows; ++row) out[at * Rows + row] = rows[row][at];
  }
}

}  // namespace

Activations::Activations(ThreadPool& pool, const ActivationRows& rows, Layout layout)
    : padded_(rows.padded),
      high_(digit_bytes(rows, layout)),
      low_(layout == Layout::kDigitGroups ? 0 : rows.batch * rows.padded),
      whole_(layout == Layout::kDigitGroups ? 0 : rows.batch * rows.padded),
      interleaved_(interleaved_bytes(rows, layout)),
      scales_(rows.batch),
      sums_(rows.batch * (rows.padded / kVector + 1)) {
  if (layout == Layout::kDigitGroups) {
    pool.run((rows.batch + kDigitGroup - 1) / kDigitGroup,
             [&](std::size_t group, std::size_t) { fill_digit_group(rows, group); });
    return;
  }
  // A task of few rows would take longer to share than to do.
  pool.run((rows.batch + kTaskRows - 1) / kTaskRows, [&](std::size_t task, std::size_t) {
    const std::size_t end = std::min(rows.batch, (task + 1) * kTaskRows);
    for (std::size_t row = task * kTaskRows; row < end; ++row) {
      const std::size_t at = row * padded_;
      fill_row(rows, row, {whole_.data() + at, high_.data() + at, low_.data() + at});
    }
  });
  if (interleaved_.size() != 0) interleave(pool);
}

// Calls body(begin, end) for ranges of padded columns, which are whole vectors.
template <class Body>
void Activations::for_columns(ThreadPool& pool, const Body& body) const {
  const std::size_t vectors = padded_ / kVector;
  const std::size_t tasks =
      batch() * padded_ < kSharedElements ? 1 : std::min(vectors, pool.size());
  pool.run(tasks, [&](std::size_t task, std::size_t) {
    body(vectors * task / tasks * kVector, vectors * (task + 1) / tasks * kVector);
  });
}

void Activations::interleave(ThreadPool& pool) {
  for_columns(pool, [&](std::size_t begin, std::size_t end) {
    for (std::size_t first = 0; first < batch(); first += kFlatGroup) {
      const std::size_t count = group(first).count;
      std::int8_t* out = interleaved_.data() + 2 * (first * padded_ + begin * count);
      for (std::size_t at = begin; at < end; at += kVector) {
        for (std::size_t column = first; column < first + count; ++column, out += 2 * kVector) {
          if (column < batch()) {
            std::memcpy(out, high_.data() + column * padded_ + at, kVector);
            std::memcpy(out + kVector, low_.data() + column * padded_ + at, kVector);
          } else {
            std::memset(out, 0, 2 * kVector);
          }
        }
      }
    }
  });
}

void Activations::interleave_whole(ThreadPool& pool) {
  if (columns() == 1 || interleaved_whole_.size() != 0) return;
  interleaved_whole_ = AlignedArray<std::int16_t>(padded_ * columns());
  const AlignedArray<std::int16_t> zeros(batch() == columns() ? 0 : padded_);
  std::fill_n(zeros.data(), zeros.size(), std::int16_t{0});
  const std::int16_t* rows[kMostFlatVectors];
  for (std::size_t column = 0; column < columns(); ++column) {
    rows[column] = column < batch() ? whole_.data() + column * padded_ : zeros.data();
  }
  std::int16_t* const out = interleaved_whole_.data();
  for_columns(pool, [&](std::size_t begin, std::size_t end) {
    switch (columns()) {
      case 2:
        return transpose<2>(rows, begin, end, out);
      case 4:
        return transpose<4>(rows, begin, end, out);
      default:
        return transpose<8>(rows, begin, end, out);
    }
  });
}

void Activations::fill_digit_group(const ActivationRows& rows, std::size_t group) {
  const AlignedArray<std::int8_t> high(padded_), low(padded_);
  const AlignedArray<std::int16_t> whole(padded_);
  std::int8_t* out = high_.data() + group * (padded_ / kVector) * kPanelStep;
  const std::size_t first = group * kDigitGroup;
  const std::size_t filled = std::min(kDigitGroup, rows.batch - first);
  if (filled < kDigitGroup) std::memset(out, 0, padded_ / kVector * kPanelStep);
  for (std::size_t i = 0; i < filled; ++i) {
    fill_row(rows, first + i, {whole.data(), high.data(), low.data()});
    spread(high.data(), padded_, out + i * kRun);
    spread(low.data(), padded_, out + (kDigitGroup + i) * kRun);
  }
}

void Activations::fill_row(const ActivationRows& rows, std::size_t row, const Buffers& out) {
  const std::size_t columns = rows.columns;
  const float* x = rows.x + row * columns;
  std::vector<float> scaled;
  if (!rows.column_scale.empty()) {
    scaled.resize(columns);
    for (std::size_t i = 0; i < columns; ++i) scaled[i] = x[i] * rows.column_scale[i];
    x = scaled.data();
  }
  const FloatKernels& floats = *kernels().floats;
  const std::int32_t largest = floats.largest_bits(x, columns);
  if (largest >= kInfinity || largest == 0) {
    std::fill_n(out.high, padded_, std::int8_t{0});
    std::fill_n(out.low, padded_, std::int8_t{0});
    std::fill_n(out.whole, padded_, std::int16_t{0});
    // NaN and infinity must not become plausible numbers.
    if (largest >= kInfinity) scales_[row] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const auto magnitude = std::bit_cast<float>(largest);
  scales_[row] = static_cast<double>(magnitude) / kLargest;
  // An exact power of two keeps the inverse of a tiny magnitude finite.
  const float lift = magnitude < 0x1p-60f ? 0x1p100f : 1.0f;
  floats.split_digits(x, columns, lift, kLargest / (magnitude * lift), out.whole, out.high,
                      out.low);
  std::fill(out.high + columns, out.high + padded_, std::int8_t{0});
  std::fill(out.low + columns, out.low + padded_, std::int8_t{0});
  std::fill(out.whole + columns, out.whole + padded_, std::int16_t{0});
  std::int64_t* sums = sums_.data() + row * (padded_ / kVector + 1);
  for (std::size_t vector = 0; vector < padded_ / kVector; ++vector) {
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < kVector; ++i) sum += out.whole[vector * kVector + i];
    sums[vector + 1] = sums[vector] + sum;
  }
}

}  // namespace entrollm
