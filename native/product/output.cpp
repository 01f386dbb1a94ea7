#include "product/output.hpp"

#include <algorithm>

namespace entrollm {

void Output::write(std::size_t first_row, std::size_t rows, const RowSums& sums, std::size_t first,
                   std::size_t batch) const {
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t i = first_row + row;
    const double scale = scales_.scale_of(i);
    const double offset = scales_.offset_of(i);
    for (std::size_t column = 0; column < batch; ++column) {
      const double sum = scale * static_cast<double>(sums.data[row * sums.stride + column]) +
                         offset * static_cast<double>(x_.sum(first + column));
      out_.y[(first + column) * out_.stride + i] =
          static_cast<float>(sum * x_.scale(first + column));
    }
  }
}

void Output::write_panels(const PanelProduct& product, std::size_t first_row,
                          std::size_t first) const {
  static constexpr float kNoOffset = 0.0f;
  SumScaling scaling{};
  scaling.rows = product.rows;
  scaling.scale_step = scales_.scale.size() > 1 ? 1 : 0;
  scaling.scales = scales_.scale.data() + first_row * scaling.scale_step;
  scaling.offset_step = scales_.offset.size() > 1 ? 1 : 0;
  scaling.offsets =
      scales_.offset.empty() ? &kNoOffset : scales_.offset.data() + first_row * scaling.offset_step;
  scaling.stride = out_.stride;
  for (std::size_t group = 0; group < product.digit_groups; ++group) {
    double x_sums[kDigitGroup] = {}, x_scales[kDigitGroup] = {};
    const std::size_t begin = first + group * kDigitGroup;
    scaling.columns = std::min(kDigitGroup, x_.batch() - begin);
    for (std::size_t i = 0; i < scaling.columns; ++i) {
      x_sums[i] = static_cast<double>(x_.sum(begin + i));
      x_scales[i] = x_.scale(begin + i);
    }
    scaling.sums = product.sums + group * product.rows * kDigitGroup;
    scaling.x_sums = x_sums;
    scaling.x_scales = x_scales;
    scaling.out = out_.y + begin * out_.stride + first_row;
    kernels().floats->scale_sums(scaling);
  }
}

}  // namespace entrollm
