// The part of entrollm._core that binds lossless matrices.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/kernels.hpp"
#include "python/module_matrix.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace entrollm {
namespace {

FloatType type_of(const std::string& name) {
  if (name == "BF16") return FloatType::kBfloat16;
  if (name == "F16") return FloatType::kHalf;
  if (name == "F8_E4M3") return FloatType::kE4M3;
  if (name == "F8_E5M2") return FloatType::kE5M2;
  throw std::invalid_argument("unknown type of lossless weights: " + name);
}

std::unique_ptr<PyLosslessMatrix> make_lossless(nb::object symbols,
                                                std::optional<Vector<std::uint8_t>> low,
                                                const std::string& type) {
  LosslessMatrix::Symbols source;
  if (nb::isinstance<PyFlatMatrix>(symbols)) {
    source = &nb::cast<const PyFlatMatrix&>(symbols).matrix;
  } else {
    source = &nb::cast<const PyMatrix&>(symbols).matrix;
  }
  LosslessMatrix matrix(source, low ? view(*low) : std::span<const std::uint8_t>(), type_of(type));
  return std::unique_ptr<PyLosslessMatrix>(new PyLosslessMatrix{std::move(symbols), low, matrix});
}

// The same words, with their high bytes in another form.
std::unique_ptr<PyLosslessMatrix> with_symbols(const PyLosslessMatrix& self,
                                               const PyFlatMatrix& symbols) {
  const std::span<const std::uint8_t> low =
      self.low ? view(*self.low) : std::span<const std::uint8_t>();
  LosslessMatrix matrix(&symbols.matrix, low, self.matrix.type());
  return std::unique_ptr<PyLosslessMatrix>(
      new PyLosslessMatrix{nb::find(symbols), self.low, matrix});
}

nb::ndarray<nb::numpy, float> multiply_all(const std::vector<const PyLosslessMatrix*>& matrices,
                                           Matrix<float> x, ThreadPool& pool) {
  ProductCall<std::vector<const LosslessMatrix*>> call(std::move(x));
  for (const PyLosslessMatrix* matrix : matrices) call.add(matrix);
  return call.run([&](const auto& all, const float* rows, std::size_t count, float* y) {
    multiply_lossless(pool, all, rows, count, y);
  });
}

nb::ndarray<nb::numpy, std::uint8_t> words(const PyLosslessMatrix& self, std::size_t begin,
                                           std::size_t end, ThreadPool& pool) {
  const Geometry& geometry = self.matrix.geometry();
  if (begin > end || end > geometry.rows) throw std::invalid_argument("rows out of range");
  const std::size_t shape[2] = {end - begin, geometry.columns * word_bytes(self.matrix.type())};
  std::uint8_t* out = allocate<std::uint8_t>(shape[0] * shape[1]);
  auto result = own(out, shape);
  const nb::gil_scoped_release release;
  self.matrix.words(pool, begin, end, out);
  return result;
}

nb::ndarray<nb::numpy, float> dequantize(const PyLosslessMatrix& self, Vector<std::int64_t> rows,
                                         ThreadPool& pool) {
  const std::size_t shape[2] = {rows.size(), self.matrix.geometry().columns};
  float* out = allocate<float>(shape[0] * shape[1]);
  auto result = own(out, shape);
  const nb::gil_scoped_release release;
  self.matrix.dequantize(pool, view(rows), out);
  return result;
}

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void split(Matrix<std::uint16_t> words, Bytes high, Bytes low) {
  for (const Bytes* part : {&high, &low}) {
    if (part->shape(0) != words.shape(0) || part->shape(1) != words.shape(1)) {
      throw std::invalid_argument("the parts must have the shape of the words");
    }
  }
  const nb::gil_scoped_release release;
  kernels().lossless->split(words.data(), words.size(), high.data(), low.data());
}

}  // namespace

void bind_lossless(nb::module_& m) {
  nb::class_<PyLosslessMatrix>(m, "LosslessMatrix")
      .def(nb::new_(&make_lossless), "symbols"_a, "low"_a.none(), "type"_a)
      .def("with_symbols", &with_symbols, "symbols"_a)
      .def("words", &words, "begin"_a, "end"_a, "pool"_a)
      .def("dequantize", &dequantize, "rows"_a, "pool"_a);
  m.def("multiply_lossless", &multiply_all, "matrices"_a, "x"_a, "pool"_a);
  m.def("split_words", &split, "words"_a, "high"_a, "low"_a);
}

}  // namespace entrollm
