// The part of entrollm._core that binds matrices with group scales: arrays are checked here, once.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "python/module_matrix.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace entrollm {
namespace {

Element element_of(const std::string& type) {
  if (type == "F32") return Element::kFloat32;
  if (type == "F16") return Element::kHalf;
  if (type == "BF16") return Element::kBfloat16;
  if (type == "U8") return Element::kUnsigned8;
  if (type == "I8") return Element::kSigned8;
  throw std::invalid_argument("unknown type of group scales: " + type);
}

std::size_t bytes_of(Element type) {
  return type == Element::kFloat32                              ? 4
         : type == Element::kHalf || type == Element::kBfloat16 ? 2
                                                                : 1;
}

// Two types of numbers take no alignment in Python; loads of theirs need it.
const void* checked(const StoredArray& array, std::size_t count) {
  const Element type = element_of(array.second);
  if (array.first.size() != count * bytes_of(type)) {
    throw std::invalid_argument("an array of group scales has " +
                                std::to_string(array.first.size()) + " bytes, expected " +
                                std::to_string(count * bytes_of(type)));
  }
  if (reinterpret_cast<std::uintptr_t>(array.first.data()) % bytes_of(type) != 0) {
    throw std::invalid_argument("an array of group scales is not aligned");
  }
  return array.first.data();
}

// The arrays of a part, `values` and perhaps `supers`, by the names of the format.
struct PartArrays {
  std::optional<StoredArray> values;
  std::optional<StoredArray> supers;
};

GroupArray group_array(const PartArrays& part, std::size_t rows, std::size_t groups,
                       std::size_t ratio) {
  GroupArray array;
  if (!part.values) return array;
  array.values = checked(*part.values, rows * groups);
  array.type = element_of(part.values->second);
  if (part.supers) {
    array.supers = checked(*part.supers, rows * ((groups - 1) / ratio + 1));
    array.super_type = element_of(part.supers->second);
    array.ratio = ratio;
  }
  return array;
}

std::unique_ptr<PyGroupedMatrix> make_grouped(nb::object coded, std::size_t size, std::size_t ratio,
                                              const nb::dict& arrays, float zero, float factor,
                                              std::optional<Vector<float>> values) {
  const auto& source = nb::cast<const PyMatrix&>(coded);
  const Geometry& geometry = source.matrix.geometry();
  if (size == 0 || ratio == 0) throw std::invalid_argument("groups must have columns");
  const auto find = [&](const char* name) -> std::optional<StoredArray> {
    if (!arrays.contains(name)) return std::nullopt;
    const auto pair = nb::cast<nb::tuple>(arrays[name]);
    return StoredArray(nb::cast<Vector<std::uint8_t>>(pair[0]), nb::cast<std::string>(pair[1]));
  };
  const PartArrays scale{find("group_scale"), find("super_scale")};
  const PartArrays zeros{find("group_zero"), std::nullopt};
  const PartArrays minimum{find("group_minimum"), find("super_minimum")};
  if (!scale.values) throw std::invalid_argument("there is no group_scale");
  GroupScales scales{size, {}, values ? view(*values) : std::span<const float>()};
  scales.terms.groups = (geometry.columns - 1) / size + 1;
  scales.terms.scale = group_array(scale, geometry.rows, scales.terms.groups, ratio);
  scales.terms.zero = group_array(zeros, geometry.rows, scales.terms.groups, ratio);
  scales.terms.minimum = group_array(minimum, geometry.rows, scales.terms.groups, ratio);
  scales.terms.zero_of_all = zero;
  scales.terms.factor = factor;
  std::vector<StoredArray> kept;
  for (const auto* part : {&scale, &zeros, &minimum}) {
    if (part->values) kept.push_back(*part->values);
    if (part->supers) kept.push_back(*part->supers);
  }
  GroupedMatrix matrix(source.matrix, scales);
  return std::unique_ptr<PyGroupedMatrix>(
      new PyGroupedMatrix{std::move(coded), std::move(kept), values, std::move(matrix)});
}

nb::ndarray<nb::numpy, float> multiply_all(const std::vector<const PyGroupedMatrix*>& matrices,
                                           Matrix<float> x, ThreadPool& pool) {
  ProductCall<std::vector<const GroupedMatrix*>> call(std::move(x));
  for (const PyGroupedMatrix* matrix : matrices) call.add(matrix);
  return call.run([&](const auto& all, const float* rows, std::size_t count, float* y) {
    multiply_grouped(pool, all, rows, count, y);
  });
}

}  // namespace

void bind_grouped(nb::module_& m) {
  nb::class_<PyGroupedMatrix>(m, "GroupedMatrix")
      .def(nb::new_(&make_grouped), "coded"_a, "size"_a, "ratio"_a, "arrays"_a, "zero"_a,
           "factor"_a, "values"_a.none())
      .def(
          "flatten",
          [](PyGroupedMatrix& self, ThreadPool& pool) {
            const nb::gil_scoped_release release;
            self.matrix.flatten(pool);
          },
          "pool"_a)
      .def_prop_ro("can_flatten",
                   [](const PyGroupedMatrix& self) { return self.matrix.can_flatten(); })
      .def_prop_ro("is_flat", [](const PyGroupedMatrix& self) { return self.matrix.is_flat(); })
      .def_prop_ro("bits", [](const PyGroupedMatrix& self) { return self.matrix.bits(); })
      .def_prop_ro("size_bytes",
                   [](const PyGroupedMatrix& self) { return self.matrix.size_bytes(); });
  m.def("multiply_grouped", &multiply_all, "matrices"_a, "x"_a, "pool"_a);
}

}  // namespace entrollm
