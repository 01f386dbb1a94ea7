// The primitives that every instruction set implements; see docs/format.md for the byte layout they
// read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {

// Weights are processed in vectors of this many symbols; block sizes are multiples of it.
inline constexpr std::size_t kVector = 64;

// A kernel may read this many bytes past the last byte it needs, and write as many past the last
// byte it produces. Scratch buffers and the stored streams are padded accordingly (checked at
// load).
inline constexpr std::size_t kSlack = 64;

// Escaped symbols are taken from `child` in order; `child` is null when the node has no escape.
// `table` maps a field to a byte and has 64 entries; it is unused when bits == 8 (raw bytes).
struct FieldArgs {
  const std::uint8_t* fields;
  std::size_t count;
  int bits;
  const std::uint8_t* table;
  const std::uint8_t* child;
};

// One activation vector as balanced base-256 digits: x = 256 * high + low, both in [-128, 127].
struct Digits {
  const std::int8_t* high;
  const std::int8_t* low;
};

inline constexpr std::size_t kColumnTile = 4;

struct Kernels {
  const char* name;

  // Fields stored as `bits` planes of ceil(count / 8) bytes. Returns how many escapes it met among
  // the first `count` fields.
  std::size_t (*sparse_field)(const FieldArgs& args, std::uint8_t* out);

  // Fields stored as packed groups of 4, 2 and 1 bits; count is a multiple of kVector. Returns the
  // number of escapes.
  std::size_t (*dense_field)(const FieldArgs& args, std::uint8_t* out);

  // out[i] is the next symbol of `right` where bit i of `plane` is set, else the next of `left`.
  void (*split)(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
                const std::uint8_t* right, std::uint8_t* out);

  // Ors the dense fields of `bits` bits into `out`; count is a multiple of kVector.
  void (*or_low_bits)(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out);

  // Number of positions below `count` at which all of the `bits` planes are set.
  std::size_t (*count_all_ones)(const std::uint8_t* planes, std::size_t count, int bits);

  // Exact integer products of `count` weights (a multiple of kVector, at most 64 * kVector) with
  // the digits of one, or of kColumnTile, activation vectors.
  std::int64_t (*dot)(const std::uint8_t* weights, const Digits& x, std::size_t count);
  void (*dot_tile)(const std::uint8_t* weights, const Digits* x, std::size_t count,
                   std::int64_t* out);
};

// Bytes that `count` dense fields of `bits` bits take: groups of 4, 2 and 1 bits, or raw bytes.
constexpr std::size_t dense_bytes(std::size_t count, int bits) {
  if (bits == 8) return count;
  std::size_t total = 0;
  if (bits & 4) total += (count + 127) / 128 * 64;
  if (bits & 2) total += (count + 255) / 256 * 64;
  if (bits & 1) total += count / 8;
  return total;
}

// Bytes of a stored stream of `size` bytes with its padding.
constexpr std::size_t stored_bytes(std::size_t size) { return (size + kSlack + 63) / 64 * 64; }

constexpr std::size_t sparse_bytes(std::size_t count, int bits) {
  return bits == 8 ? count : static_cast<std::size_t>(bits) * ((count + 7) / 8);
}

extern const Kernels kScalarKernels;
#ifdef ENTROLLM_HAVE_AVX512
extern const Kernels kAvx512Kernels;
#endif

// The fastest kernels this processor runs, or those that ENTROLLM_ISA names; throws
// std::invalid_argument when the named set is unknown or the processor lacks it.
const Kernels& select_kernels(const char* name);

}  // namespace entrollm
