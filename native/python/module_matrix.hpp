// Matrices as Python holds them.
#pragma once

#include <optional>
#include <span>
#include <stdexcept>
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

// A transcoded matrix or a copy has streams of its own and shares the scales of the first one.
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
  nanobind::object owner;  // of the matrix of the high bytes
  std::optional<Vector<std::uint8_t>> low;
  LosslessMatrix matrix;
};

// A product with several matrices, their outputs side by side. `All` is a vector of pointers to
// what the native product takes.
template <class All>
class ProductCall {
 public:
  explicit ProductCall(Matrix<float> x) : x_(std::move(x)) {}

  template <class AnyPyMatrix>
  void add(const AnyPyMatrix* matrix) {
    if (matrix == nullptr) throw nanobind::type_error("a matrix is None");
    const Geometry& geometry = matrix->matrix.geometry();
    if (x_.shape(1) != geometry.columns) {
      throw std::invalid_argument("x has " + std::to_string(x_.shape(1)) +
                                  " columns, the matrix has " + std::to_string(geometry.columns));
    }
    all_.push_back(&matrix->matrix);
    outputs_ += geometry.rows;
  }

  template <class Multiply>
  nanobind::ndarray<nanobind::numpy, float> run(const Multiply& multiply) const {
    const std::size_t shape[2] = {x_.shape(0), outputs_};
    float* y = allocate<float>(shape[0] * shape[1]);
    auto result = own(y, shape);
    const nanobind::gil_scoped_release release;
    multiply(all_, x_.data(), shape[0], y);
    return result;
  }

 private:
  Matrix<float> x_;
  All all_;
  std::size_t outputs_ = 0;
};

}  // namespace entrollm
