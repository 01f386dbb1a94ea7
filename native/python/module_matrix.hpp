// The coded matrix as Python holds it.
#pragma once

#include <optional>
#include <span>

#include "product/matrix.hpp"
#include "python/module_arrays.hpp"

namespace entrollm {

template <class T>
std::span<const T> view(const Vector<T>& array) {
  return {array.data(), array.size()};
}

// Keeps the Python arrays alive for as long as the matrix reads them.
struct PyMatrix {
  Vector<std::uint8_t> dense;
  Vector<std::uint8_t> sparse;
  Vector<float> scale;
  std::optional<Vector<float>> offset;
  std::optional<Vector<float>> column_scale;
  CodedMatrix matrix;
};

}  // namespace entrollm
