// Portable kernels, which define what the vector versions compute.
#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

unsigned plane_bit(const std::uint8_t* plane, std::size_t i) {
  return (plane[i / 8] >> (i % 8)) & 1u;
}

// Field i of `width` bits in packed vectors: the fields of a byte belong to successive vectors.
unsigned packed_field(const std::uint8_t* packed, std::size_t i, int width) {
  const auto bits = static_cast<std::size_t>(width);
  const std::size_t shared = 8 / bits;  // vectors of symbols to a packed one
  const std::size_t vector = i / kVector;
  const std::uint8_t byte = packed[vector / shared * kVector + i % kVector];
  return (byte >> (vector % shared * bits)) & ((1u << width) - 1);
}

unsigned dense_value(const std::uint8_t* fields, std::size_t count, std::size_t i, int bits) {
  unsigned value = 0;
  if (bits & 4) {
    value = packed_field(fields, i, 4);
    fields += dense_bytes(count, 4);
  }
  if (bits & 2) {
    value = value << 2 | packed_field(fields, i, 2);
    fields += dense_bytes(count, 2);
  }
  if (bits & 1) value = value << 1 | plane_bit(fields, i);
  return value;
}

// Looks fields up, or takes the next escaped symbol. `read(i)` is field i.
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
  if (args.bits == kRawBits) {
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
  if (args.bits == kRawBits) {
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

std::uint8_t map_symbols(const std::uint8_t* in, std::size_t count, std::uint8_t mask,
                         const std::uint8_t* map, std::uint8_t* out) {
  std::uint8_t seen = 0;
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = map[in[i] & mask];
    seen |= out[i];
  }
  return seen;
}

void pack_plane(const std::uint8_t* fields, std::size_t count, int bit, std::uint8_t* out) {
  for (std::size_t byte = 0; byte < (count + 7) / 8; ++byte) {
    std::uint64_t word = 0;
    std::memcpy(&word, fields + byte * 8, std::min<std::size_t>(8, count - byte * 8));
    // The multiplication gathers one bit of each of eight bytes in the top byte.
    word = (word >> bit) & 0x0101010101010101u;
    out[byte] = static_cast<std::uint8_t>(word * 0x0102040810204080u >> 56);
  }
}

void pack_fields(const std::uint8_t* fields, std::size_t count, int shift, int width,
                 std::uint8_t* out) {
  const std::size_t per_byte = 8 / static_cast<std::size_t>(width);
  const auto mask = static_cast<std::uint8_t>((1 << width) - 1);
  for (std::size_t vector = 0; vector < count / kVector; ++vector) {
    std::uint8_t* packed = out + vector / per_byte * kVector;
    const auto up = static_cast<int>(vector % per_byte) * width;
    if (up == 0) std::memset(packed, 0, kVector);
    for (std::size_t lane = 0; lane < kVector; ++lane) {
      const auto part = static_cast<std::uint8_t>(fields[vector * kVector + lane] >> shift) & mask;
      packed[lane] = static_cast<std::uint8_t>(packed[lane] | part << up);
    }
  }
}

std::size_t select(const std::uint8_t* symbols, const std::uint8_t* fields, std::size_t count,
                   std::uint8_t field, std::uint8_t* out) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; ++i) {
    out[kept] = symbols[i];
    kept += fields[i] == field;
  }
  return kept;
}

}  // namespace

const EncodeKernels kScalarEncodeKernels = {map_symbols, pack_plane, pack_fields, select};

constinit const Kernels kScalarKernels = {.name = "scalar",
                                          .sparse_field = sparse_field,
                                          .dense_field = dense_field,
                                          .split = split,
                                          .or_low_bits = or_low_bits,
                                          .count_all_ones = count_all_ones,
                                          .dot = dot,
                                          .dot_tile = dot_tile};

}  // namespace entrollm
