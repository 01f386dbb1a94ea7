// NumPy arrays as arguments and results of the module's functions.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>

#include "product/arena.hpp"

namespace entrollm {

template <class T>
using Vector =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Matrix =
    nanobind::ndarray<const T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

// Memory for `size` elements of a new array, which the caller fills.
template <class T>
T* allocate(std::size_t size) {
  T* data = new T[size == 0 ? 1 : size];
  want_huge_pages(data, size * sizeof(T));
  return data;
}

// A new array that owns memory from allocate().
template <class T, std::size_t N>
nanobind::ndarray<nanobind::numpy, T> own(T* data, const std::size_t (&shape)[N]) {
  nanobind::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nanobind::ndarray<nanobind::numpy, T>(data, N, shape, owner);
}

// Adds the functions of native/ops to the module.
void bind_ops(nanobind::module_& m);

// Adds the halves of a decoder layer.
void bind_layer(nanobind::module_& m);

// Adds matrices with group scales.
void bind_grouped(nanobind::module_& m);

// Adds rounding to the paths of a trellis.
void bind_rounding(nanobind::module_& m);

// Adds lossless matrices.
void bind_lossless(nanobind::module_& m);

}  // namespace entrollm
