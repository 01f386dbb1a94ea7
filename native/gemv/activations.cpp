#include "gemv/activations.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace entrollm {
namespace {

// The largest magnitude whose two balanced digits both fit int8: 127 * 256 + 127.
constexpr float kLargest = 32639.0f;

}  // namespace

Activations::Activations(const float* x, std::size_t batch, std::size_t columns, std::size_t padded,
                         std::span<const float> column_scale)
    : padded_(padded),
      high_(batch * padded),
      low_(batch * padded),
      whole_(batch * padded),
      scales_(batch),
      sums_(batch * (padded / kVector + 1)) {
  std::vector<float> scaled(columns);
  for (std::size_t row = 0; row < batch; ++row) {
    const float* source = x + row * columns;
    if (!column_scale.empty()) {
      for (std::size_t i = 0; i < columns; ++i) scaled[i] = source[i] * column_scale[i];
      source = scaled.data();
    }
    float largest = 0.0f;
    bool finite = true;
    for (std::size_t i = 0; i < columns; ++i) {
      const float magnitude = std::fabs(source[i]);
      finite &= magnitude <= std::numeric_limits<float>::max();
      largest = std::max(largest, magnitude);
    }
    if (!finite) {  // NaN and infinity must not turn into plausible numbers
      scales_[row] = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    if (largest == 0.0f) continue;
    scales_[row] = static_cast<double>(largest) / kLargest;
    const auto inverse = 1.0 / scales_[row];
    std::int64_t sum = 0;
    std::int8_t* high = high_.data() + row * padded;
    std::int8_t* low = low_.data() + row * padded;
    std::int16_t* whole = whole_.data() + row * padded;
    std::int64_t* sums = sums_.data() + row * (padded / kVector + 1);
    for (std::size_t i = 0; i < columns; ++i) {
      const auto value = static_cast<std::int32_t>(std::lrint(source[i] * inverse));
      const std::int32_t high_digit = (value + 128) >> 8;
      high[i] = static_cast<std::int8_t>(high_digit);
      low[i] = static_cast<std::int8_t>(value - high_digit * 256);
      whole[i] = static_cast<std::int16_t>(value);
      if (i % kVector == 0) sums[i / kVector] = sum;
      sum += value;
    }
    sums[padded / kVector] = sum;
  }
}

}  // namespace entrollm
