#include "gemv/activations.hpp"

#include <algorithm>
#include <bit>
#include <limits>

namespace entrollm {
namespace {

// The largest magnitude whose two balanced digits both fit int8: 127 * 256 + 127.
constexpr float kLargest = 32639.0f;

// Adding and subtracting this rounds a float below 2^22 to an integer, ties to even.
constexpr float kRounder = 12582912.0f;

constexpr std::int32_t kInfinity = 0x7f800000;

// The largest magnitude of x as float bits, which order as integers do; at least kInfinity when an
// entry is not finite.
std::int32_t largest_bits(const float* x, std::size_t count) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::bit_cast<std::int32_t>(x[i]) & 0x7fffffff);
  }
  return largest;
}

// Rounds `x` times two factors to integers and splits them into digits. Simple loops, which
// compilers vectorize.
void split_digits(const float* x, std::size_t count, float lift, float inverse, std::int16_t* whole,
                  std::int8_t* high, std::int8_t* low) {
  for (std::size_t i = 0; i < count; ++i) {
    whole[i] = static_cast<std::int16_t>((x[i] * lift * inverse + kRounder) - kRounder);
  }
  for (std::size_t i = 0; i < count; ++i) {
    const int high_digit = (whole[i] + 128) >> 8;
    high[i] = static_cast<std::int8_t>(high_digit);
    low[i] = static_cast<std::int8_t>(whole[i] - high_digit * 256);
  }
}

}  // namespace

Activations::Activations(const float* x, std::size_t batch, std::size_t columns, std::size_t padded,
                         std::span<const float> column_scale)
    : padded_(padded),
      high_(batch * padded),
      low_(batch * padded),
      whole_(batch * padded),
      scales_(batch),
      sums_(batch * (padded / kVector + 1)) {
  std::vector<float> scaled(column_scale.size());
  for (std::size_t row = 0; row < batch; ++row) {
    const float* source = x + row * columns;
    if (!column_scale.empty()) {
      for (std::size_t i = 0; i < columns; ++i) scaled[i] = source[i] * column_scale[i];
      source = scaled.data();
    }
    fill_row(source, columns, row);
  }
}

void Activations::fill_row(const float* x, std::size_t columns, std::size_t row) {
  std::int8_t* high = high_.data() + row * padded_;
  std::int8_t* low = low_.data() + row * padded_;
  std::int16_t* whole = whole_.data() + row * padded_;
  std::fill(high, high + padded_, std::int8_t{0});
  std::fill(low, low + padded_, std::int8_t{0});
  std::fill(whole, whole + padded_, std::int16_t{0});
  const std::int32_t largest = largest_bits(x, columns);
  if (largest >= kInfinity) {  // NaN and infinity must not turn into plausible numbers
    scales_[row] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  if (largest == 0) return;
  const auto magnitude = std::bit_cast<float>(largest);
  scales_[row] = static_cast<double>(magnitude) / kLargest;
  // An exact power of two keeps the inverse of a tiny magnitude finite.
  const float lift = magnitude < 0x1p-60f ? 0x1p100f : 1.0f;
  split_digits(x, columns, lift, kLargest / (magnitude * lift), whole, high, low);
  std::int64_t* sums = sums_.data() + row * (padded_ / kVector + 1);
  for (std::size_t vector = 0; vector < padded_ / kVector; ++vector) {
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < kVector; ++i) sum += whole[vector * kVector + i];
    sums[vector + 1] = sums[vector] + sum;
  }
}

}  // namespace entrollm
