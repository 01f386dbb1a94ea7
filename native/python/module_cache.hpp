// Cached keys and values as NumPy arrays, which are checked here.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "ops/ops.hpp"

namespace entrollm {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// The stride of an axis in elements, which is never negative.
template <class Array>
std::size_t stride(const Array& array, std::size_t axis) {
  require(array.shape(axis) < 2 || array.stride(axis) >= 0, "an array runs backwards");
  return static_cast<std::size_t>(array.stride(axis));
}

// Whether the last two axes are contiguous.
template <class Array>
bool is_packed(const Array& array) {
  return (array.shape(2) < 2 || array.stride(2) == 1) &&
         (array.shape(1) < 2 || stride(array, 1) == array.shape(2));
}

inline CacheType cache_type(nanobind::dlpack::dtype type) {
  if (type == nanobind::dtype<float>()) return CacheType::kFloat32;
  if (type == nanobind::dtype<std::int8_t>()) return CacheType::kInt8;
  const auto code = static_cast<std::uint8_t>(nanobind::dlpack::dtype_code::Float);
  require(type.code == code && type.bits == 16 && type.lanes == 1,
          "keys and values should be float32, float16 or int8");
  return CacheType::kFloat16;
}

// Keys (kv_heads, head_dim, length) and values (kv_heads, length, head_dim) of one type, which are
// written only if the arrays can be, and the scales of both, (2, kv_heads, length), of integers.
template <class Cached, class Scales>
CachedPositions cached_positions(const Cached& keys, const Cached& values,
                                 const std::optional<Scales>& scales) {
  CachedPositions cache{};
  cache.type = cache_type(keys.dtype());
  require(cache_type(values.dtype()) == cache.type, "keys and values should be of one type");
  cache.length = keys.shape(2);
  require(keys.shape(0) > 0 && keys.shape(0) == values.shape(0) &&
              values.shape(1) == cache.length && values.shape(2) == keys.shape(1),
          "keys and values do not hold the same positions, heads and features");
  require(cache.length < 2 || keys.stride(2) == 1, "the positions of keys should lie side by side");
  require(is_packed(values), "the values of a head should lie one behind the other");
  cache.keys = const_cast<void*>(static_cast<const void*>(keys.data()));
  cache.key_head_stride = stride(keys, 0);
  cache.key_stride = stride(keys, 1);
  cache.values = const_cast<void*>(static_cast<const void*>(values.data()));
  cache.value_head_stride = stride(values, 0);
  require(scales.has_value() == (cache.type == CacheType::kInt8),
          "integers, and nothing else, should have scales");
  if (scales) {
    require(scales->shape(0) == 2 && scales->shape(1) == keys.shape(0) &&
                scales->shape(2) == cache.length,
            "there should be scales for the keys and values of each head and position");
    require(cache.length < 2 || scales->stride(2) == 1, "scales should lie side by side");
    cache.key_scales = const_cast<float*>(scales->data());
    cache.value_scales = cache.key_scales + stride(*scales, 0);
    cache.scale_head_stride = stride(*scales, 1);
  }
  return cache;
}

// Keys, values and scales of positions before others.
template <class Cached, class Scales>
using Earlier = std::vector<std::tuple<Cached, Cached, std::optional<Scales>>>;

// Runs of positions before those of `cache`, whose keys are `keys`.
template <class Cached, class Scales>
std::vector<CachedPositions> earlier_positions(const Earlier<Cached, Scales>& earlier,
                                               const CachedPositions& cache, const Cached& keys) {
  std::vector<CachedPositions> runs;
  for (const auto& [their_keys, their_values, their_scales] : earlier) {
    runs.push_back(cached_positions(their_keys, their_values, their_scales));
    require(runs.back().type == cache.type && their_keys.shape(0) == keys.shape(0) &&
                their_keys.shape(1) == keys.shape(1),
            "earlier keys and values do not fit the others");
  }
  return runs;
}

}  // namespace entrollm
