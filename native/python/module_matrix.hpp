// Matrices as Python holds them.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "product/flat_matrix.hpp"
#include "product/grouped.hpp"
#include "product/lossless.hpp"
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

// A transcoded matrix has streams of its own and shares the scales of the coded one.
struct PyFlatMatrix {
  std::optional<Vector<std::uint8_t>> fields;
  std::optional<Vector<std::uint8_t>> patches;
  Vector<float> scale;
  std::optional<Vector<float>> offset;
  std::optional<Vector<float>> column_scale;
  FlatMatrix matrix;
};

using PyAnyMatrix = std::variant<const PyMatrix*, const PyFlatMatrix*>;

// The bytes of an array, and the safetensors name of the type of its elements.
using StoredArray = std::pair<Vector<std::uint8_t>, std::string>;

struct PyGroupedMatrix {
  nanobind::object owner;  // of the coded matrix
  std::vector<StoredArray> arrays;
  std::optional<Vector<float>> values;
  GroupedMatrix matrix;
};

struct PyLosslessMatrix {
  nanobind::object owner;  // of the coded matrix
  std::optional<Vector<std::uint8_t>> low;
  LosslessMatrix matrix;
};

}  // namespace entrollm
