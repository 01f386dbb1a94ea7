#include "product/output.hpp"

#include <algorithm>

namespace entrollm {

namespace {

// The scales and offsets of a matrix from row `first` on.
SumScaling scaling_of(const Scales& scales, std::size_t first, std::size_t rows) {
  static constexpr float kNoOffset = 0.0f;
  SumScaling scaling{};
  scaling.rows = rows;
  scaling.scale_step = scales.scale.size() > 1 ? 1 : 0;
  scaling.scales = scales.scale.data() + first * scaling.scale_step;
  scaling.offset_step = scales.offset.size() > 1 ? 1 : 0;
  scaling.offsets =
      scales.offset.empty() ? &kNoOffset : scales.offset.data() + first * scaling.offset_step;
  return scaling;
}

}  // namespace

void Output::write_eight(SumScaling& scaling, std::size_t first_row, std::size_t first) const {
  double x_sums[kDigitGroup] = {}, x_scales[kDigitGroup] = {};
  scaling.columns = std::min(kDigitGroup, x_.batch() - first);
  for (std::size_t i = 0; i < scaling.columns; ++i) {
    x_sums[i] = static_cast<double>(x_.sum(first + i));
    x_scales[i] = x_.scale(first + i);
  }
  scaling.x_sums = x_sums;
  scaling.x_scales = x_scales;
  scaling.out = out_.y + first * out_.stride + first_row;
  scaling.stride = out_.stride;
  kernels().floats->scale_sums(scaling);
}

void Output::write(std::size_t first_row, std::size_t rows, const RowSums& sums, std::size_t first,
                   std::size_t batch) const {
  SumScaling scaling = scaling_of(scales_, first_row, rows);
  scaling.sum_stride = sums.stride;
  std::size_t column = 0;
  for (; column + kDigitGroup <= batch; column += kDigitGroup) {
    scaling.sums = sums.data + column;
    write_eight(scaling, first_row, first + column);
  }
  for (; column < batch; ++column) {
    const double x_sum = static_cast<double>(x_.sum(first + column));
    const double x_scale = x_.scale(first + column);
    const std::int64_t* from = sums.data + column;
    float* to = out_.y + (first + column) * out_.stride + first_row;
    for (std::size_t row = 0; row < rows; ++row) {
      const double scale = scaling.scales[row * scaling.scale_step];
      const double offset = scaling.offsets[row * scaling.offset_step];
      const double sum = scale * static_cast<double>(from[row * sums.stride]) + offset * x_sum;
      to[row] = static_cast<float>(sum * x_scale);
    }
  }
}

void Output::write_panels(const PanelProduct& product, std::size_t first_row,
                          std::size_t first) const {
  SumScaling scaling = scaling_of(scales_, first_row, product.rows);
  scaling.sum_stride = kDigitGroup;
  for (std::size_t group = 0; group < product.digit_groups; ++group) {
    scaling.sums = product.sums + group * product.rows * kDigitGroup;
    write_eight(scaling, first_row, first + group * kDigitGroup);
  }
}

}  // namespace entrollm
