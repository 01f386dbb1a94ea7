// The part of entrollm._core that binds native/ops. Arrays are checked here, and only here.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/ops.hpp"
#include "python/module_arrays.hpp"
#include "python/module_cache.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace entrollm {
namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Cached = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using Written = nb::ndarray<nb::ndim<3>, nb::device::cpu>;
using WrittenScales = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;

nb::ndarray<nb::numpy, float> rms_norm(Floats x, Floats weight, float eps, ThreadPool& pool) {
  require(x.ndim() >= 1 && x.ndim() <= 3 && weight.ndim() >= 1, "x has 1 to 3 axes");
  const std::size_t features = x.shape(x.ndim() - 1);
  require(features > 0 && weight.shape(weight.ndim() - 1) == features && weight.size() > 0,
          "x and weight have other numbers of features");
  std::size_t shape[3] = {1, 1, 1};
  for (std::size_t axis = 0; axis < x.ndim(); ++axis) shape[axis] = x.shape(axis);
  float* out = allocate<float>(x.size());
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  nb::ndarray<nb::numpy, float> result(out, x.ndim(), shape, owner);
  const nb::gil_scoped_release release;
  run(pool, RmsNorm{x.data(), x.size() / features, features, weight.data(),
                    weight.size() / features, weight.size(), eps, out});
  return result;
}

void rotate(nb::ndarray<float, nb::ndim<3>, nb::device::cpu> x, Floats cosines, Floats sines,
            ThreadPool& pool) {
  require(is_packed(x), "the heads of x should lie one behind the other");
  const std::size_t tokens = x.shape(0);
  require(cosines.ndim() > 0 && cosines.size() == sines.size(), "as many sines as cosines");
  const std::size_t half = cosines.shape(cosines.ndim() - 1);
  require(cosines.size() == tokens * half && 2 * half <= x.shape(2),
          "the angles do not fit x: (tokens, ..., at most half of head_dim)");
  const Rotation op{x.data(),   tokens,         stride(x, 0), x.shape(1),
                    x.shape(2), cosines.data(), sines.data(), half};
  const nb::gil_scoped_release release;
  run(pool, op);
}

nb::ndarray<nb::numpy, float> gated(Matrix<float> gate_up, ThreadPool& pool, Gate gate) {
  require(gate_up.shape(1) % 2 == 0, "gate_up should have an even number of columns");
  const std::size_t shape[2] = {gate_up.shape(0), gate_up.shape(1) / 2};
  float* out = allocate<float>(shape[0] * shape[1]);
  auto result = own(out, shape);
  const nb::gil_scoped_release release;
  run(pool, GatedUnits{gate_up.data(), shape[0], shape[1], gate, out});
  return result;
}

nb::ndarray<nb::numpy, float> attention(Heads queries, Cached keys, Cached values,
                                        std::optional<std::size_t> window, ThreadPool& pool,
                                        const std::optional<Heads>& scales,
                                        const Earlier<Cached, Heads>& earlier) {
  const std::size_t tokens = queries.shape(0);
  const std::size_t heads = queries.shape(1);
  const std::size_t kv_heads = keys.shape(0);
  const std::size_t head_dim = keys.shape(1);
  const CachedPositions cache = cached_positions(keys, values, scales);
  const std::vector<CachedPositions> before = earlier_positions(earlier, cache, keys);
  require(is_packed(queries), "heads should lie one behind the other");
  require(queries.shape(2) == head_dim && head_dim > 0,
          "queries, keys and values have other numbers of features");
  require(cache.length >= tokens, "there are fewer positions than queries");
  require(heads % kv_heads == 0, "heads should be a multiple of kv_heads");
  require(!window || *window > 0, "a window has at least one position");
  const std::size_t shape[2] = {tokens, heads * head_dim};
  float* out = allocate<float>(shape[0] * shape[1]);
  auto result = own(out, shape);
  const Attention op{
      queries.data(), tokens, stride(queries, 0), heads, head_dim, kv_heads, cache, window, out,
      before};
  const nb::gil_scoped_release release;
  run(pool, std::span(&op, 1));
  return result;
}

void append(Heads new_keys, Heads new_values, Written keys, Written values,
            const std::optional<WrittenScales>& scales, ThreadPool& pool) {
  const CachedPositions cache = cached_positions(keys, values, scales);
  const std::size_t tokens = new_keys.shape(0), kv_heads = keys.shape(0), dim = keys.shape(1);
  for (const Heads& each : {new_keys, new_values}) {
    require(each.shape(0) == tokens && each.shape(1) == kv_heads && each.shape(2) == dim,
            "new keys and values do not fit the others");
    require(is_packed(each), "heads should lie one behind the other");
  }
  require(tokens < 2 || stride(new_keys, 0) == stride(new_values, 0),
          "new keys and values lie differently");
  require(tokens <= cache.length, "there are fewer positions than new ones");
  const Append op{
      new_keys.data(), new_values.data(), tokens, stride(new_keys, 0), kv_heads, dim, cache};
  const nb::gil_scoped_release release;
  run(pool, std::span(&op, 1));
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "pool"_a);
  m.def("rotate", &rotate, "x"_a, "cosines"_a, "sines"_a, "pool"_a);
  m.def(
      "swiglu",
      [](Matrix<float> gate_up, ThreadPool& pool) { return gated(gate_up, pool, Gate::kSilu); },
      "gate_up"_a, "pool"_a);
  m.def(
      "geglu",
      [](Matrix<float> gate_up, ThreadPool& pool) { return gated(gate_up, pool, Gate::kGelu); },
      "gate_up"_a, "pool"_a);
  m.def("attention", &attention, "queries"_a, "keys"_a.noconvert(), "values"_a.noconvert(),
        "window"_a.none(), "pool"_a, "scales"_a.none() = nb::none(),
        "earlier"_a.noconvert() = Earlier<Cached, Heads>());
  m.def("append", &append, "new_keys"_a, "new_values"_a, "keys"_a.noconvert(),
        "values"_a.noconvert(), "scales"_a.none().noconvert(), "pool"_a);
}

}  // namespace entrollm
