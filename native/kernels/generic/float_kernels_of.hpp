// The float kernels, for the instruction set that the including file is compiled for. They must not
// call functions of the standard library that the linker could share with other files.
#pragma once

#include <bit>
#include <cmath>

#include "kernels/float_kernels.hpp"
#include "kernels/generic/float_lanes.hpp"
#include "kernels/generic/instantiations.hpp"

namespace entrollm {
namespace {

std::int32_t largest_bits(const float* x, std::size_t count) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

void split_digits(const float* x, std::size_t count, float lift, float inverse, std::int16_t* whole,
                  std::int8_t* high, std::int8_t* low) {
  // Adding and subtracting this rounds a float below 2^22 to an integer, ties to even.
  constexpr float kRounder = 12582912.0f;
  for (std::size_t i = 0; i < count; ++i) {
    whole[i] = static_cast<std::int16_t>((x[i] * lift * inverse + kRounder) - kRounder);
  }
  for (std::size_t i = 0; i < count; ++i) {
    const int high_digit = (whole[i] + 128) >> 8;
    high[i] = static_cast<std::int8_t>(high_digit);
    low[i] = static_cast<std::int8_t>(whole[i] - high_digit * 256);
  }
}

void scale_sums(const SumScaling& s) {
  constexpr std::size_t kColumns = 8;
  constexpr std::size_t kRows = 64;
  float block[kRows][kColumns];  // so that results are written column by column
  for (std::size_t first = 0; first < s.rows; first += kRows) {
    const std::size_t rows = kRows < s.rows - first ? kRows : s.rows - first;
    for (std::size_t row = 0; row < rows; ++row) {
      const double scale = s.scales[(first + row) * s.scale_step];
      const double offset = s.offsets[(first + row) * s.offset_step];
      const std::int64_t* sums = s.sums + (first + row) * s.sum_stride;
      for (std::size_t i = 0; i < kColumns; ++i) {
        const double sum = scale * static_cast<double>(sums[i]) + offset * s.x_sums[i];
        block[row][i] = static_cast<float>(sum * s.x_scales[i]);
      }
    }
    for (std::size_t column = 0; column < s.columns; ++column) {
      float* out = s.out + column * s.stride + first;
      for (std::size_t row = 0; row < rows; ++row) out[row] = block[row][column];
    }
  }
}

void rms_norm(const float* x, const float* weight, std::size_t count, float eps, float* out) {
  const std::size_t whole = count / kLanes * kLanes;
  const std::size_t rest = count - whole;
  Lanes squares = splat(0.0f);
  for (std::size_t i = 0; i < whole; i += kLanes) {
    const Lanes v = load_lanes(x + i);
    squares = squares + v * v;
  }
  const Lanes last = load_some(x + whole, rest, 0.0f);
  squares = squares + last * last;
  const float root = std::sqrt(sum_of(squares) / static_cast<float>(count) + eps);
  const Lanes divisor = splat(root);
  for (std::size_t i = 0; i < whole; i += kLanes) {
    store_lanes(out + i, load_lanes(x + i) / divisor * load_lanes(weight + i));
  }
  for (std::size_t i = whole; i < count; ++i) out[i] = x[i] / root * weight[i];
}

void rotate(float* x, const float* cosines, const float* sines, std::size_t half) {
  for (std::size_t i = 0; i < half; ++i) {
    const float first = x[i];
    const float second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i] + first * sines[i];
  }
}

inline Lanes silu_of(const Lanes& x) { return x / (exp_of(splat(0.0f) - x) + splat(1.0f)); }

// x / 2 * (1 + tanh(u)) is x / (1 + exp(-2 u)), with u = sqrt(2 / pi) * (x + 0.044715 * x^3).
inline Lanes gelu_of(const Lanes& x) {
  const Lanes cube = x * x * x;
  const Lanes u = splat(0.7978845608f) * (x + splat(0.044715f) * cube);
  return x / (exp_of(splat(-2.0f) * u) + splat(1.0f));
}

template <Lanes Gate(const Lanes&)>
void gated(const float* gate, const float* up, std::size_t count, float* out) {
  const std::size_t whole = count / kLanes * kLanes;
  const std::size_t rest = count - whole;
  for (std::size_t i = 0; i < whole; i += kLanes) {
    store_lanes(out + i, Gate(load_lanes(gate + i)) * load_lanes(up + i));
  }
  const Lanes last = Gate(load_some(gate + whole, rest, 0.0f)) * load_some(up + whole, rest, 0.0f);
  store_some(out + whole, last, rest);
}

void swiglu(const float* gate, const float* up, std::size_t count, float* out) {
  gated<silu_of>(gate, up, count, out);
}

void geglu(const float* gate, const float* up, std::size_t count, float* out) {
  gated<gelu_of>(gate, up, count, out);
}

}  // namespace
}  // namespace entrollm
