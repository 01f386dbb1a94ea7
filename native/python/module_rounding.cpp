// The part of entrollm._core that rounds. Arrays are checked here.
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "kernels/kernels.hpp"
#include "python/module_arrays.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace entrollm {
namespace {

nb::ndarray<nb::numpy, float> round_trellis(Matrix<float> left, std::optional<Matrix<float>> reach,
                                            Vector<float> weights, Vector<float> prices,
                                            Matrix<float> start, bool has_origin) {
  const std::size_t columns = left.shape(0), rows = left.shape(1);
  if (columns == 0 || columns > kMostTrellisColumns) {
    throw std::invalid_argument("a block has 1 to MOST_TRELLIS_COLUMNS columns");
  }
  if ((reach && (reach->shape(0) != columns || reach->shape(1) != columns)) ||
      weights.size() != columns || prices.size() != 2 * kTrellisZero || start.shape(0) != 4 ||
      start.shape(1) != rows) {
    throw std::invalid_argument("the arrays of a block differ in size");
  }
  const std::size_t shape[2] = {columns, rows};
  float* out = allocate<float>(columns * rows);
  auto result = own(out, shape);
  const nb::gil_scoped_release release;
  kernels().floats->round_trellis({columns, rows, left.data(), reach ? reach->data() : nullptr,
                                   weights.data(), prices.data(), start.data(), has_origin, out});
  return result;
}

}  // namespace

void bind_rounding(nb::module_& m) {
  m.attr("MOST_TRELLIS_COLUMNS") = kMostTrellisColumns;
  m.attr("TRELLIS_ZERO") = kTrellisZero;
  m.def("round_trellis", &round_trellis, "left"_a, "reach"_a.none(), "weights"_a, "prices"_a,
        "start"_a, "has_origin"_a);
}

}  // namespace entrollm
