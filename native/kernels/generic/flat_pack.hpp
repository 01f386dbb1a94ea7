// Packing and unpacking flat rows, written over what a FlatLanes type does for one register:
//
//   struct FlatLanes {
//     static constexpr std::size_t kLanes;  // columns of a register: 16, 32 or 64
//     using Bytes;                          // a register of kLanes bytes
//     // Fields of columns [Register * kLanes, (Register + 1) * kLanes) of a chunk, in order.
//     template <int Bits, std::size_t Register>
//     static Bytes fields(const std::uint8_t* chunk);
//     static void store(std::uint8_t* out, Bytes bytes);
//     static Bytes splat(std::uint8_t value);
//     static Bytes add(Bytes a, Bytes b);
//   };
//
// Internal linkage: code for one instruction set must not be shared by the linker with code for
// another. The including file defines FlatLanes before.
#pragma once

#include <cstring>
#include <utility>

#include "format/flat.hpp"
#include "kernels/flat_kernels.hpp"

namespace entrollm {
namespace {

// Calls body.operator()<Bits>() with the width as a constant; `bits` is 2 to 8.
template <class Body>
[[gnu::always_inline]] inline void with_flat_width(int bits, const Body& body) {
  switch (bits) {
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    case 7:
      return body.template operator()<7>();
    default:
      return body.template operator()<8>();
  }
}

// Calls body.operator()<Register>() for each register of a chunk.
template <class Lanes, class Body>
[[gnu::always_inline]] inline void for_flat_registers(const Body& body) {
  [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    (body.template operator()<I>(), ...);
  }(std::make_index_sequence<kVector / Lanes::kLanes>());
}

template <class Lanes>
void unpack_flat(const std::uint8_t* fields, std::size_t chunks, int bits, std::uint8_t base,
                 std::uint8_t* symbols) {
  with_flat_width(bits, [&]<int Bits>() __attribute__((always_inline)) {
    const auto bases = Lanes::splat(base);
    const std::uint8_t* chunk = fields;
    std::uint8_t* out = symbols;
    for (std::size_t i = 0; i < chunks; ++i, chunk += flat_chunk_bytes(Bits), out += kVector) {
      for_flat_registers<Lanes>([&]<std::size_t Register>() __attribute__((always_inline)) {
        Lanes::store(out + Register * Lanes::kLanes,
                     Lanes::add(Lanes::template fields<Bits, Register>(chunk), bases));
      });
    }
  });
}

// Loops of constant length over bytes, which compilers turn into vectors.
template <int Bits>
[[gnu::always_inline]] inline void pack_flat_chunk(const std::uint8_t* fields, std::uint8_t* out) {
  if constexpr (has_flat_part(Bits, 4)) {
    for (std::size_t i = 0; i < 32; ++i) {
      out[i] = static_cast<std::uint8_t>((fields[i] & 15) | fields[32 + i] << 4);
    }
    out += 32;
  }
  if constexpr (has_flat_part(Bits, 2)) {
    constexpr int kShift = flat_part_shift(Bits, 2);
    for (std::size_t i = 0; i < 16; ++i) {
      unsigned byte = 0;
      for (std::size_t k = 0; k < 4; ++k) byte |= (fields[16 * k + i] >> kShift & 3u) << 2 * k;
      out[i] = static_cast<std::uint8_t>(byte);
    }
    out += 16;
  }
  if constexpr (has_flat_part(Bits, 1)) {
    constexpr int kShift = flat_part_shift(Bits, 1);
    for (std::size_t i = 0; i < 8; ++i) {
      unsigned byte = 0;
      for (std::size_t k = 0; k < 8; ++k) byte |= (fields[8 * k + i] >> kShift & 1u) << k;
      out[i] = static_cast<std::uint8_t>(byte);
    }
  }
}

// `symbol` less `base`, clipped to the width.
template <int Bits>
[[gnu::always_inline]] inline std::uint8_t flat_clip(std::uint8_t symbol, std::uint8_t base) {
  constexpr std::uint8_t kLargest = (1u << Bits) - 1;
  const auto field = static_cast<std::uint8_t>(symbol < base ? 0 : symbol - base);
  return field < kLargest ? field : kLargest;
}

inline void pack_flat(const std::uint8_t* symbols, std::size_t chunks, int bits, std::uint8_t base,
                      std::uint8_t* fields) {
  with_flat_width(bits, [&]<int Bits>() __attribute__((always_inline)) {
    const std::uint8_t* in = symbols;
    std::uint8_t* out = fields;
    for (std::size_t i = 0; i < chunks; ++i, in += kVector, out += flat_chunk_bytes(Bits)) {
      alignas(kVector) std::uint8_t clipped[kVector];
      for (std::size_t k = 0; k < kVector; ++k) clipped[k] = flat_clip<Bits>(in[k], base);
      if constexpr (Bits == 8) {
        std::memcpy(out, clipped, kVector);
      } else {
        pack_flat_chunk<Bits>(clipped, out);
      }
    }
  });
}

}  // namespace
}  // namespace entrollm
