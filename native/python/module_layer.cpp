// The part of entrollm._core that binds native/layer: arrays are checked here.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "layer/blocks.hpp"
#include "python/module_cache.hpp"
#include "python/module_matrix.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace entrollm {
namespace {

using Weight = std::optional<Vector<float>>;
using Rows = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Cached = nb::ndarray<nb::ndim<3>, nb::device::cpu>;
using Scales = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;

// Tokens, keys, values, window and scales of a sequence, and the positions before.
using Sequence = std::tuple<std::size_t, Cached, Cached, std::optional<std::size_t>,
                            std::optional<Scales>, Earlier<Cached, Scales>>;

std::span<const float> span_of(const Weight& weight) {
  return weight ? view(*weight) : std::span<const float>();
}

// What Python holds keeps alive what it is made of.
struct PyProduct {
  std::vector<nb::object> matrices;
  Weight bias;
  JoinedProduct product;
};

std::unique_ptr<PyProduct> make_joined(std::string name, const std::vector<nb::object>& matrices,
                                       Weight bias) {
  require(!matrices.empty(), "a product needs a matrix");
  const auto all_of = [&]<class Py>() {
    std::vector<decltype(&std::declval<const Py&>().matrix)> all;
    for (const nb::object& matrix : matrices) all.push_back(&nb::cast<const Py&>(matrix).matrix);
    return all;
  };
  JoinedProduct::Matrices all;
  if (nb::isinstance<PyGroupedMatrix>(matrices.front())) {
    all = all_of.operator()<PyGroupedMatrix>();
  } else if (nb::isinstance<PyLosslessMatrix>(matrices.front())) {
    all = all_of.operator()<PyLosslessMatrix>();
  } else {
    std::vector<AnyMatrix> plain;
    for (const nb::object& matrix : matrices) {
      if (nb::isinstance<PyFlatMatrix>(matrix)) {
        plain.push_back(&nb::cast<const PyFlatMatrix&>(matrix).matrix);
      } else {
        plain.push_back(&nb::cast<const PyMatrix&>(matrix).matrix);
      }
    }
    all = std::move(plain);
  }
  JoinedProduct product(std::move(name), std::move(all), span_of(bias));
  return std::unique_ptr<PyProduct>(new PyProduct{matrices, bias, std::move(product)});
}

struct PySurroundings {
  Weight norm, output_norm;
  float eps;
  std::optional<float> scale;

  Surroundings view() const { return {span_of(norm), span_of(output_norm), eps, scale}; }
};

struct PyAttentionBlock {
  nb::object qkv, output;
  PySurroundings surroundings;
  Weight head_norms, query_norm, key_norm;
  AttentionBlock block;
};

std::unique_ptr<PyAttentionBlock> make_attention(nb::object qkv, nb::object output,
                                                 const PySurroundings& surroundings,
                                                 const AttentionShape& shape, Weight head_norms,
                                                 Weight query_norm, Weight key_norm) {
  const QueryKeyNorms norms{span_of(head_norms), span_of(query_norm), span_of(key_norm)};
  AttentionBlock block(nb::cast<const PyProduct&>(qkv).product,
                       nb::cast<const PyProduct&>(output).product, surroundings.view(), shape,
                       norms);
  return std::unique_ptr<PyAttentionBlock>(new PyAttentionBlock{
      qkv, output, surroundings, head_norms, query_norm, key_norm, std::move(block)});
}

struct PyFeedForwardBlock {
  nb::object up, down;
  PySurroundings surroundings;
  FeedForwardBlock block;
};

std::unique_ptr<PyFeedForwardBlock> make_feed_forward(nb::object up, nb::object down,
                                                      const PySurroundings& surroundings,
                                                      bool is_gelu) {
  FeedForwardBlock block(nb::cast<const PyProduct&>(up).product,
                         nb::cast<const PyProduct&>(down).product, surroundings.view(),
                         is_gelu ? Gate::kGelu : Gate::kSilu);
  return std::unique_ptr<PyFeedForwardBlock>(
      new PyFeedForwardBlock{up, down, surroundings, std::move(block)});
}

SequenceCache checked(const AttentionShape& shape, const Sequence& sequence) {
  const auto& [tokens, keys, values, window, scales, earlier] = sequence;
  const CachedPositions cache = cached_positions(keys, values, scales);
  require(tokens > 0 && tokens <= cache.length, "a sequence has fewer positions than new tokens");
  require(keys.shape(0) == shape.kv_heads && keys.shape(1) == shape.head_dim,
          "keys and values do not fit the heads");
  require(!window || *window > 0, "a window has at least one position");
  return {tokens, cache, window, earlier_positions(earlier, cache, keys)};
}

RowAngles checked(const AttentionShape& shape, std::size_t rows, const std::optional<Rows>& cosines,
                  const std::optional<Rows>& sines, const std::optional<Rows>& query_factors) {
  RowAngles angles{};
  require(cosines.has_value() == sines.has_value(), "there must be as many sines as cosines");
  if (cosines) {
    require(cosines->ndim() > 0 && cosines->size() == sines->size(), "as many sines as cosines");
    angles.half = cosines->shape(cosines->ndim() - 1);
    require(cosines->size() == rows * angles.half && 2 * angles.half <= shape.head_dim,
            "the angles do not fit the rows and heads");
    angles.cosines = cosines->data();
    angles.sines = sines->data();
  }
  if (query_factors) {
    require(query_factors->size() == rows, "there must be a query factor for each row");
    angles.query_factors = query_factors->data();
  }
  return angles;
}

nb::ndarray<nb::numpy, float> run_attention(const PyAttentionBlock& self, Matrix<float> x,
                                            const std::optional<Rows>& cosines,
                                            const std::optional<Rows>& sines,
                                            const std::optional<Rows>& query_factors,
                                            const std::vector<Sequence>& sequences,
                                            ThreadPool& pool) {
  const AttentionBlock& block = self.block;
  const std::size_t rows = x.shape(0);
  require(x.shape(1) == block.features(), "x has another number of features than the layer");
  const RowAngles angles = checked(block.shape(), rows, cosines, sines, query_factors);
  std::vector<SequenceCache> caches;
  std::size_t tokens = 0;
  for (const Sequence& sequence : sequences) {
    caches.push_back(checked(block.shape(), sequence));
    tokens += caches.back().tokens;
  }
  require(tokens == rows, "there must be a row for each new token");
  const std::size_t shape[2] = {rows, x.shape(1)};
  float* y = allocate<float>(shape[0] * shape[1]);
  auto result = own(y, shape);
  const nb::gil_scoped_release release;
  block.run(pool, x.data(), rows, angles, caches, y);
  return result;
}

nb::ndarray<nb::numpy, float> run_feed_forward(const PyFeedForwardBlock& self, Matrix<float> x,
                                               ThreadPool& pool) {
  require(x.shape(1) == self.block.features(), "x has another number of features than the layer");
  const std::size_t shape[2] = {x.shape(0), x.shape(1)};
  float* y = allocate<float>(shape[0] * shape[1]);
  auto result = own(y, shape);
  const nb::gil_scoped_release release;
  self.block.run(pool, x.data(), shape[0], y);
  return result;
}

}  // namespace

void bind_layer(nb::module_& m) {
  nb::class_<PyProduct>(m, "JoinedProduct")
      .def(nb::new_(&make_joined), "name"_a, "matrices"_a, "bias"_a.none());
  nb::class_<PySurroundings>(m, "Surroundings")
      .def(
          "__init__",
          [](PySurroundings* self, Weight norm, Weight output_norm, float eps,
             std::optional<float> scale) {
            new (self) PySurroundings{norm, output_norm, eps, scale};
          },
          "norm"_a.none(), "output_norm"_a.none(), "eps"_a, "scale"_a.none());
  nb::class_<AttentionShape>(m, "AttentionShape")
      .def(
          "__init__",
          [](AttentionShape* self, std::size_t heads, std::size_t kv_heads, std::size_t head_dim,
             std::optional<float> query_factor) {
            new (self) AttentionShape{heads, kv_heads, head_dim, query_factor};
          },
          "heads"_a, "kv_heads"_a, "head_dim"_a, "query_factor"_a.none());
  nb::class_<PyAttentionBlock>(m, "AttentionBlock")
      .def(nb::new_(&make_attention), "qkv"_a, "output"_a, "surroundings"_a, "shape"_a,
           "head_norms"_a.none(), "query_norm"_a.none(), "key_norm"_a.none())
      .def("__call__", &run_attention, "x"_a, "cosines"_a.none(), "sines"_a.none(),
           "query_factors"_a.none(), "sequences"_a.noconvert(), "pool"_a);
  nb::class_<PyFeedForwardBlock>(m, "FeedForwardBlock")
      .def(nb::new_(&make_feed_forward), "up"_a, "down"_a, "surroundings"_a, "is_gelu"_a)
      .def("__call__", &run_feed_forward, "x"_a, "pool"_a);
}

}  // namespace entrollm
