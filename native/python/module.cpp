// The Python module entrollm._core. It takes and returns arrays; its loops run without Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "codec/decode.hpp"
#include "codec/encode.hpp"
#include "codec/flat_encode.hpp"
#include "codec/histogram.hpp"
#include "format/code.hpp"
#include "format/geometry.hpp"
#include "kernels/kernels.hpp"
#include "product/flat_matrix.hpp"
#include "product/matrix.hpp"
#include "product/product.hpp"
#include "python/module_arrays.hpp"
#include "python/module_matrix.hpp"
#include "threads/pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace entrollm {
namespace {

template <class T>
nb::ndarray<nb::numpy, T> to_array(const std::vector<T>& values) {
  T* data = allocate<T>(values.size());
  std::copy(values.begin(), values.end(), data);
  const std::size_t shape[1] = {values.size()};
  return own(data, shape);
}

std::unique_ptr<PyMatrix> make_matrix(nb::bytes program, int low_bits, Geometry geometry,
                                      Vector<std::uint8_t> dense, Vector<std::uint8_t> sparse,
                                      Vector<std::uint16_t> sparse_sizes, Vector<float> scale,
                                      std::optional<Vector<float>> offset,
                                      std::optional<Vector<float>> column_scale, bool trellis) {
  const auto bytes = std::span(static_cast<const std::uint8_t*>(program.data()), program.size());
  Scales scales{view(scale), offset ? view(*offset) : std::span<const float>(),
                column_scale ? view(*column_scale) : std::span<const float>()};
  CodedMatrix matrix(Code(bytes, low_bits), geometry, view(dense), view(sparse), view(sparse_sizes),
                     scales, trellis);
  return std::unique_ptr<PyMatrix>(
      new PyMatrix{dense, sparse, scale, offset, column_scale, std::move(matrix)});
}

std::unique_ptr<PyFlatMatrix> transcode(const PyMatrix& coded, ThreadPool& pool) {
  const auto make = [&] {
    const nb::gil_scoped_release release;
    return FlatMatrix(pool, coded.matrix);
  };
  return std::unique_ptr<PyFlatMatrix>(
      new PyFlatMatrix{{}, {}, coded.scale, coded.offset, coded.column_scale, make()});
}

std::unique_ptr<PyFlatMatrix> copy_flat(const PyFlatMatrix& stored, ThreadPool& pool) {
  const auto make = [&] {
    const nb::gil_scoped_release release;
    return FlatMatrix(pool, stored.matrix);
  };
  return std::unique_ptr<PyFlatMatrix>(
      new PyFlatMatrix{{}, {}, stored.scale, stored.offset, stored.column_scale, make()});
}

std::unique_ptr<PyFlatMatrix> open_flat(std::pair<std::size_t, std::size_t> shape,
                                        std::size_t segment_rows, Vector<std::uint16_t> windows,
                                        Vector<std::uint8_t> fields, Vector<std::uint8_t> patches,
                                        Vector<std::uint16_t> row_sizes, Vector<float> scale,
                                        std::optional<Vector<float>> offset,
                                        std::optional<Vector<float>> column_scale, bool trellis) {
  if (reinterpret_cast<std::uintptr_t>(patches.data()) % alignof(FlatPatch) != 0) {
    throw std::invalid_argument("patches are not aligned");
  }
  const Scales scales{view(scale), offset ? view(*offset) : std::span<const float>(),
                      column_scale ? view(*column_scale) : std::span<const float>()};
  const FlatStreams streams{segment_rows, view(fields), view(patches), view(row_sizes),
                            view(windows)};
  return std::unique_ptr<PyFlatMatrix>(
      new PyFlatMatrix{fields, patches, scale, offset, column_scale,
                       FlatMatrix(shape.first, shape.second, streams, scales, trellis)});
}

nb::ndarray<nb::numpy, float> multiply_all(const std::vector<PyAnyMatrix>& matrices,
                                           Matrix<float> x, ThreadPool& pool) {
  ProductCall<std::vector<AnyMatrix>> call(std::move(x));
  for (const PyAnyMatrix& matrix : matrices) {
    std::visit([&](const auto* each) { call.add(each); }, matrix);
  }
  return call.run([&](const auto& all, const float* rows, std::size_t count, float* y) {
    multiply(pool, all, rows, count, y);
  });
}

template <class AnyPyMatrix>
nb::ndarray<nb::numpy, std::uint8_t> decode(const AnyPyMatrix& self, std::size_t begin,
                                            std::size_t end, ThreadPool& pool) {
  if (begin > end || end > self.matrix.geometry().rows) {
    throw std::invalid_argument("rows out of range");
  }
  const std::size_t shape[2] = {end - begin, self.matrix.geometry().columns};
  std::uint8_t* out = allocate<std::uint8_t>(shape[0] * shape[1]);
  auto result = own(out, shape);
  const nb::gil_scoped_release release;
  self.matrix.decode(pool, begin, end, out);
  return result;
}

template <class AnyPyMatrix>
nb::ndarray<nb::numpy, float> dequantize(const AnyPyMatrix& self, Vector<std::int64_t> rows,
                                         ThreadPool& pool) {
  const std::size_t shape[2] = {rows.size(), self.matrix.geometry().columns};
  float* out = allocate<float>(shape[0] * shape[1]);
  auto result = own(out, shape);
  const nb::gil_scoped_release release;
  self.matrix.dequantize(pool, view(rows), out);
  return result;
}

nb::tuple encode(nb::bytes program, int low_bits, Matrix<std::uint8_t> symbols,
                 std::size_t block_rows, std::size_t block_columns) {
  const auto bytes = std::span(static_cast<const std::uint8_t*>(program.data()), program.size());
  const Code code(bytes, low_bits);
  const Geometry geometry{symbols.shape(0), symbols.shape(1), block_rows, block_columns};
  geometry.validate();
  EncodedRows encoded;
  {
    const nb::gil_scoped_release release;
    encoded = encode_rows(code, geometry, symbols.data());
  }
  return nb::make_tuple(to_array(encoded.dense), to_array(encoded.sparse),
                        to_array(encoded.sparse_sizes));
}

nb::tuple encode_flat_symbols(Matrix<std::uint8_t> symbols, std::size_t segment_rows,
                              Vector<std::uint16_t> windows) {
  if (segment_rows == 0) throw std::invalid_argument("segments have no rows");
  EncodedFlat encoded;
  {
    const nb::gil_scoped_release release;
    encoded = encode_flat(symbols.data(), symbols.shape(0), symbols.shape(1), segment_rows,
                          view(windows));
  }
  return nb::make_tuple(to_array(encoded.fields), to_array(encoded.patches),
                        to_array(encoded.row_sizes), to_array(encoded.windows));
}

nb::ndarray<nb::numpy, std::int64_t> histogram(Matrix<std::uint8_t> symbols) {
  std::uint64_t counts[256] = {};
  {
    const nb::gil_scoped_release release;
    add_to_histogram(symbols.data(), symbols.size(), counts);
  }
  return to_array(std::vector<std::int64_t>(std::begin(counts), std::end(counts)));
}

}  // namespace
}  // namespace entrollm

NB_MODULE(_core, m) {
  using namespace entrollm;
  nb::exception<CorruptBlock>(m, "CorruptBlockError", PyExc_ValueError);
  m.attr("VECTOR") = kVector;
  m.attr("SLACK_BYTES") = kSlack;
  m.attr("MAX_BLOCK") = kMaxBlock;
  m.attr("MAX_BLOCK_COLUMNS") = kMaxBlockColumns;
  m.def("isa", [] { return kernels().name; }, "Name of the instruction set in use.");
  m.def(
      "isas",
      [] {
        nb::list found;
        for (const auto& [kernels, runs] : built_kernels()) {
          found.append(nb::make_tuple(kernels->name, runs));
        }
        return found;
      },
      "Names of the instruction sets in this build, fastest first, and whether the processor runs "
      "each.");
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(
          "__init__",
          [](ThreadPool* self, std::size_t threads, std::uint32_t spin_us) {
            new (self) ThreadPool(threads, std::chrono::microseconds(spin_us));
          },
          "threads"_a, "spin_us"_a = static_cast<std::uint32_t>(ThreadPool::kSpin.count()))
      .def_prop_ro("size", &ThreadPool::size);
  nb::class_<Geometry>(m, "Geometry")
      .def(
          "__init__",
          [](Geometry* self, std::size_t rows, std::size_t columns, std::size_t block_rows,
             std::size_t block_columns) {
            Geometry geometry{rows, columns, block_rows, block_columns};
            geometry.validate();
            new (self) Geometry(geometry);
          },
          "rows"_a, "columns"_a, "block_rows"_a, "block_columns"_a)
      .def_prop_ro("blocks", &Geometry::blocks);
  nb::class_<PyMatrix>(m, "CodedMatrix")
      .def(nb::new_(&make_matrix), "program"_a, "low_bits"_a, "geometry"_a, "dense"_a, "sparse"_a,
           "sparse_sizes"_a, "scale"_a, "offset"_a.none(), "column_scale"_a.none(),
           "trellis"_a = false)
      .def(
          "multiply",
          [](const PyMatrix& self, Matrix<float> x, ThreadPool& pool) {
            return multiply_all({&self}, x, pool);
          },
          "x"_a, "pool"_a)
      .def("decode", &decode<PyMatrix>, "begin"_a, "end"_a, "pool"_a)
      .def("dequantize", &dequantize<PyMatrix>, "rows"_a, "pool"_a);
  nb::class_<PyFlatMatrix>(m, "FlatMatrix")
      .def(nb::new_(&transcode), "coded"_a, "pool"_a)
      .def_static("open", &open_flat, "shape"_a, "segment_rows"_a, "windows"_a, "fields"_a,
                  "patches"_a, "row_sizes"_a, "scale"_a, "offset"_a.none(), "column_scale"_a.none(),
                  "trellis"_a = false)
      .def("copy", &copy_flat, "pool"_a)
      .def_prop_ro("is_in_place", [](const PyFlatMatrix& self) { return self.fields.has_value(); })
      .def_prop_ro("size_bytes", [](const PyFlatMatrix& self) { return self.matrix.size_bytes(); })
      .def_prop_ro("patches", [](const PyFlatMatrix& self) { return self.matrix.patches(); })
      .def_prop_ro("rows_by_bits",
                   [](const PyFlatMatrix& self) {
                     nb::dict rows;
                     const auto counts = self.matrix.rows_by_bits();
                     for (std::size_t bits = 0; bits < counts.size(); ++bits) {
                       if (counts[bits] != 0) rows[nb::int_(bits)] = counts[bits];
                     }
                     return rows;
                   })
      .def(
          "multiply",
          [](const PyFlatMatrix& self, Matrix<float> x, ThreadPool& pool) {
            return multiply_all({&self}, x, pool);
          },
          "x"_a, "pool"_a)
      .def("decode", &decode<PyFlatMatrix>, "begin"_a, "end"_a, "pool"_a)
      .def("dequantize", &dequantize<PyFlatMatrix>, "rows"_a, "pool"_a);
  m.def("multiply", &multiply_all, "matrices"_a, "x"_a, "pool"_a);
  m.def("encode", &encode, "program"_a, "low_bits"_a, "symbols"_a, "block_rows"_a,
        "block_columns"_a);
  m.def("encode_flat", &encode_flat_symbols, "symbols"_a, "segment_rows"_a, "windows"_a);
  m.def("histogram", &histogram, "symbols"_a);
  bind_grouped(m);
  bind_layer(m);
  bind_lossless(m);
  bind_ops(m);
  bind_rounding(m);
}
