// Portable kernels: the plain statement of what the vector versions compute.
#include <bit>
#include <cstring>

#include "isa/kernels.hpp"

namespace entrollm {
namespace {

unsigned plane_bit(const std::uint8_t* plane, std::size_t i) {
  return (plane[i / 8] >> (i % 8)) & 1u;
}

// Field i of the packed groups of `width` bits; vector v of a group sits at bit v * width.
unsigned group_field(const std::uint8_t* groups, std::size_t i, int width) {
  const std::size_t per_group = kVector * 8 / static_cast<std::size_t>(width);
  const std::size_t in_group = i % per_group;
  const std::uint8_t byte = groups[i / per_group * kVector + in_group % kVector];
  return (byte >> (in_group / kVector * static_cast<std::size_t>(width))) & ((1u << width) - 1);
}

unsigned dense_value(const std::uint8_t* fields, std::size_t count, std::size_t i, int bits) {
  unsigned value = 0;
  if (bits & 4) {
    value = group_field(fields, i, 4);
    fields += dense_bytes(count, 4);
  }
  if (bits & 2) {
    value = value << 2 | group_field(fields, i, 2);
    fields += dense_bytes(count, 2);
  }
  if (bits & 1) value = value << 1 | plane_bit(fields, i);
  return value;
}

// The shared tail of both field kernels: look a field up, or take the next escaped symbol.
template <class ReadField>
std::size_t expand_fields(const FieldArgs& args, ReadField read, std::uint8_t* out) {
  const unsigned escape = (1u << args.bits) - 1;
  std::size_t escapes = 0;
  for (std::size_t i = 0; i < args.count; ++i) {
    const unsigned field = read(i);
    if (args.child != nullptr && field == escape) {
      out[i] = args.child[escapes++];
    } else {
      out[i] = args.table[field];
    }
  }
  return escapes;
}

std::size_t sparse_field(const FieldArgs& args, std::uint8_t* out) {
  if (args.bits == 8) {
    std::memcpy(out, args.fields, args.count);
    return 0;
  }
  const std::size_t plane_bytes = (args.count + 7) / 8;
  return expand_fields(
      args,
      [&](std::size_t i) {
        unsigned value = 0;
        for (int bit = 0; bit < args.bits; ++bit) {
          value |= plane_bit(args.fields + static_cast<std::size_t>(bit) * plane_bytes, i) << bit;
        }
        return value;
      },
      out);
}

std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  if (args.bits == 8) {
    std::memcpy(out, args.fields, args.count);
    return 0;
  }
  return expand_fields(
      args, [&](std::size_t i) { return dense_value(args.fields, args.count, i, args.bits); }, out);
}

void split(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
           const std::uint8_t* right, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] = plane_bit(plane, i) ? *right++ : *left++;
}

void or_low_bits(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = static_cast<std::uint8_t>(out[i] | dense_value(fields, count, i, bits));
  }
}

std::size_t count_all_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  const std::size_t plane_bytes = (count + 7) / 8;
  std::size_t total = 0;
  for (std::size_t byte = 0; byte < plane_bytes; ++byte) {
    unsigned ones = 0xff;
    for (int bit = 0; bit < bits; ++bit) {
      ones &= planes[static_cast<std::size_t>(bit) * plane_bytes + byte];
    }
    if (byte == count / 8) ones &= (1u << (count % 8)) - 1;
    total += static_cast<std::size_t>(std::popcount(ones));
  }
  return total;
}

std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  std::int32_t high = 0;
  std::int32_t low = 0;
  for (std::size_t i = 0; i < count; ++i) {
    high += weights[i] * x.high[i];
    low += weights[i] * x.low[i];
  }
  return std::int64_t{256} * high + low;
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  for (std::size_t column = 0; column < kColumnTile; ++column) {
    out[column] = dot(weights, x[column], count);
  }
}

}  // namespace

const Kernels kScalarKernels = {"scalar",       sparse_field, dense_field, split,   or_low_bits,
                                count_all_ones, dot,          dot_tile,    nullptr, nullptr};

}  // namespace entrollm
