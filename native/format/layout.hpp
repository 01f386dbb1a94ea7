// Sizes that the stored form of a matrix prescribes. docs/reference/format.md has the bytes
// themselves.
#pragma once

#include <cstddef>

namespace entrollm {

// Weights are processed in vectors of this many symbols. Block sizes are multiples of it.
inline constexpr std::size_t kVector = 64;

// A kernel may read this many bytes past the last byte that it needs, and may write this many bytes
// past the last byte that it produces. Scratch buffers have room for that, and stored streams are
// padded accordingly, which is checked at load.
inline constexpr std::size_t kSlack = 64;

// A field has 1 to kMaxFieldBits bits, or it is a raw symbol of kRawBits bits.
inline constexpr int kMaxFieldBits = 6;
inline constexpr int kRawBits = 8;

// The number of low bits that a code may store as they are.
inline constexpr int kMaxLowBits = 6;

// Bytes of `count` fields of `bits` bits in the dense layout; `count` is a multiple of kVector.
constexpr std::size_t dense_bytes(std::size_t count, int bits) {
  if (bits == kRawBits) return count;
  std::size_t total = 0;
  if (bits & 4) total += (count + 127) / 128 * 64;
  if (bits & 2) total += (count + 255) / 256 * 64;
  if (bits & 1) total += count / 8;
  return total;
}

// Bytes of `count` fields of `bits` bits in the sparse layout.
constexpr std::size_t sparse_bytes(std::size_t count, int bits) {
  return bits == kRawBits ? count : static_cast<std::size_t>(bits) * ((count + 7) / 8);
}

// Bytes of a stored stream of `size` bytes with its padding.
constexpr std::size_t stored_bytes(std::size_t size) { return (size + kSlack + 63) / 64 * 64; }

}  // namespace entrollm
