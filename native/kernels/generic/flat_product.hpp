// Products of flat rows, written over FlatLanes (see flat_pack.hpp) and an instruction set's
// FlatProducts:
//
//   struct FlatProducts {
//     using Lanes = FlatLanes;
//     using Sums;                             // a register of 32-bit sums
//     // Chunks that the loop repeats its code for.
//     static constexpr std::size_t unroll(int bits);
//     // Rows that share loads of activations.
//     static constexpr std::size_t rows(int bits, std::size_t vectors);
//     static Lanes::Bytes load(const std::int8_t*);
//     // Four totals over all lanes.
//     static void total(Sums, Sums, Sums, Sums, std::int32_t* out);
//     template <int Bits>
//     struct Accumulator {                    // of one digit of one vector with one row
//       static constexpr std::size_t kMost;   // calls of add() between those of widen()
//       void add(Lanes::Bytes fields, Lanes::Bytes digits);
//       void widen();
//       Sums sums() const;
//     };
//   };
#pragma once

#include "kernels/generic/flat_pack.hpp"

namespace entrollm {
namespace {

// Chunks that rows are multiplied with at a time: digits of half a first-level cache, or of a whole
// one where rows use them too rarely for that to matter. Sums over them fit 32 bits:
// 127 * 128 * 65536 columns < 2^31.
constexpr std::size_t flat_cut_chunks(std::size_t vectors) {
  return (vectors < kFlatGroup ? 256 : 128) / vectors;
}
static_assert(flat_cut_chunks(1) * kVector <= 65536);

// Products of differences and activations that fit 32 bits together: 8 * 32768 * 4096 < 2^31.
inline constexpr std::size_t kPatchRun = 4096;

// Fields are fetched into the second-level cache about this far ahead of their use. Nearer, or into
// the first level, a core of Zen 4 waits for memory: 20 Gweights/s at 4 bits instead of 37.
inline constexpr std::size_t kFlatAhead = 8192;

template <std::size_t Count, class Body>
[[gnu::always_inline]] inline void for_constants(const Body& body) {
  [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    (body.template operator()<I>(), ...);
  }(std::make_index_sequence<Count>());
}

// A cut of up to flat_cut_chunks chunks through some rows.
struct FlatCut {
  const std::uint8_t* fields;  // of the first row
  std::size_t row_bytes;       // from a row to the next
  std::size_t chunks;
  std::size_t ahead;          // bytes from a field to the one to fetch
  const std::int8_t* digits;  // of the first vector
  std::size_t digits_step;    // from a chunk's to the next one's
};

// Rows times Vectors sums, kept in registers.
template <class Products, int Bits, std::size_t Rows, std::size_t Vectors>
class FlatTile {
 public:
  [[gnu::always_inline]] inline explicit FlatTile(const FlatCut& cut) : cut_(cut) {}

  // Adds to sums[row * stride + vector].
  [[gnu::always_inline]] inline void run(std::int64_t* sums, std::size_t stride) {
    std::size_t left = cut_.chunks;
    const std::uint8_t* fields = cut_.fields;
    const std::int8_t* digits = cut_.digits;
    for (; left >= kRun; left -= kRun) {
      fetch(fields);
      constexpr std::size_t kMostUnrolled = Products::unroll(Bits);
      constexpr std::size_t kUnrolled = kRun < kMostUnrolled ? kRun : kMostUnrolled;
#pragma GCC unroll 1
      for (std::size_t chunk = 0; chunk < kRun; chunk += kUnrolled) {
        for_constants<kUnrolled>([&]<std::size_t Chunk>() __attribute__((always_inline)) {
          add_chunk(fields + Chunk * kChunkBytes, digits + Chunk * cut_.digits_step);
        });
        fields += kUnrolled * kChunkBytes;
        digits += kUnrolled * cut_.digits_step;
      }
      widen();
    }
    for (; left > 0; --left, fields += kChunkBytes, digits += cut_.digits_step) {
      add_chunk(fields, digits);
    }
    widen();
    write(sums, stride);
  }

 private:
  using Lanes = typename Products::Lanes;
  using Accumulator = typename Products::template Accumulator<Bits>;
  static constexpr std::size_t kRegisters = kVector / Lanes::kLanes;
  static constexpr std::size_t kChunkBytes = flat_chunk_bytes(Bits);
  // Chunks of a step of the loop, of which 16-bit sums of many bits take fewer.
  static constexpr std::size_t kMostRun = 4;
  static constexpr std::size_t kRun = Accumulator::kMost >= kMostRun * kRegisters ? kMostRun
                                      : Accumulator::kMost >= 2 * kRegisters      ? 2
                                                                                  : 1;

  [[gnu::always_inline]] inline void fetch(const std::uint8_t* fields) const {
    constexpr std::size_t kLine = 64;
    for_constants<Rows>([&]<std::size_t Row>() __attribute__((always_inline)) {
      for_constants<(kRun * kChunkBytes + kLine - 1) / kLine>(
          [&]<std::size_t Line>() __attribute__((always_inline)) {
            __builtin_prefetch(fields + Row * cut_.row_bytes + cut_.ahead + Line * kLine, 0, 2);
          });
    });
  }

  [[gnu::always_inline]] inline void add_chunk(const std::uint8_t* fields,
                                               const std::int8_t* digits) {
    for_constants<kRegisters>([&]<std::size_t Register>() __attribute__((always_inline)) {
      typename Lanes::Bytes weights[Rows];
      for_constants<Rows>([&]<std::size_t Row>() __attribute__((always_inline)) {
        weights[Row] = Lanes::template fields<Bits, Register>(fields + Row * cut_.row_bytes);
      });
      for_constants<2 * Vectors>([&]<std::size_t Digit>() __attribute__((always_inline)) {
        const auto x = Products::load(digits + Digit * kVector + Register * Lanes::kLanes);
        for_constants<Rows>([&]<std::size_t Row>() __attribute__((always_inline)) {
          sums_[Row][Digit].add(weights[Row], x);
        });
      });
      if constexpr (Accumulator::kMost < kRegisters && (Register + 1) % Accumulator::kMost == 0 &&
                    Register + 1 < kRegisters) {
        widen();
      }
    });
    if constexpr (Accumulator::kMost < kRegisters) widen();
  }

  [[gnu::always_inline]] inline void widen() {
    for_constants<Rows * 2 * Vectors>([&]<std::size_t I>() __attribute__((always_inline)) {
      sums_[I / (2 * Vectors)][I % (2 * Vectors)].widen();
    });
  }

  [[gnu::always_inline]] inline void write(std::int64_t* sums, std::size_t stride) const {
    constexpr std::size_t kSums = Rows * 2 * Vectors;
    std::int32_t totals[kSums < 4 ? 4 : kSums];
    for_constants<(kSums + 3) / 4>([&]<std::size_t Four>() __attribute__((always_inline)) {
      constexpr std::size_t kAt = 4 * Four;
      constexpr std::size_t kNext = kAt + 2 < kSums ? kAt + 2 : kAt;
      Products::total(sum<kAt>(), sum<kAt + 1>(), sum<kNext>(), sum<kNext + 1>(), totals + kAt);
    });
    for_constants<Rows * Vectors>([&]<std::size_t I>() __attribute__((always_inline)) {
      sums[I / Vectors * stride + I % Vectors] +=
          std::int64_t{256} * totals[2 * I] + totals[2 * I + 1];
    });
  }

  template <std::size_t I>
  [[gnu::always_inline]] inline auto sum() const {
    return sums_[I / (2 * Vectors)][I % (2 * Vectors)].sums();
  }

  const FlatCut cut_;
  Accumulator sums_[Rows][2 * Vectors];  // high and low digits of each vector
};

// How far ahead to fetch where `rows` rows are read at once: within long rows, or in the rows of a
// later step.
inline std::size_t flat_ahead(const FlatCut& cut, std::size_t cut_bytes, std::size_t rows) {
  if (cut_bytes >= 2 * kFlatAhead) return kFlatAhead;
  const std::size_t steps = (kFlatAhead + rows * cut_bytes - 1) / (rows * cut_bytes);
  return steps * rows * cut.row_bytes;
}

template <class Products, int Bits, std::size_t Rows, std::size_t Vectors>
[[gnu::noinline]] void multiply_flat_cut(FlatCut cut, std::size_t rows, std::int64_t* sums,
                                         std::size_t stride) {
  cut.ahead = flat_ahead(cut, flat_row_bytes(cut.chunks, Bits), Rows);
  for (; rows >= Rows; rows -= Rows, cut.fields += Rows * cut.row_bytes, sums += Rows * stride) {
    FlatTile<Products, Bits, Rows, Vectors>(cut).run(sums, stride);
  }
  if constexpr (Rows > 1) {
    for (; rows > 0; --rows, cut.fields += cut.row_bytes, sums += stride) {
      FlatTile<Products, Bits, 1, Vectors>(cut).run(sums, stride);
    }
  }
}

template <class Products, int Bits, std::size_t Vectors>
void multiply_flat_vectors(const FlatRows& rows, const std::int8_t* digits, std::int64_t* sums,
                           std::size_t stride) {
  FlatCut cut{};
  cut.row_bytes = flat_row_bytes(rows.chunks, Bits);
  cut.digits_step = 2 * Vectors * kVector;
  for (std::size_t row = 0; row < rows.rows; ++row) {
    for (std::size_t i = 0; i < Vectors; ++i) sums[row * stride + i] = 0;
  }
  constexpr std::size_t kCut = flat_cut_chunks(Vectors);
  for (std::size_t first = 0; first < rows.chunks; first += kCut) {
    const std::size_t left = rows.chunks - first;
    cut.chunks = left < kCut ? left : kCut;
    cut.fields = rows.fields + flat_row_bytes(first, Bits);
    cut.digits = digits + first * cut.digits_step;
    multiply_flat_cut<Products, Bits, Products::rows(Bits, Vectors), Vectors>(cut, rows.rows, sums,
                                                                              stride);
  }
}

template <class Products>
void multiply_flat(const FlatRows& rows, const FlatVectors& x, std::int64_t* sums,
                   std::size_t stride) {
  with_flat_width(rows.bits, [&]<int Bits>() __attribute__((always_inline)) {
    if constexpr (Bits < 8) {
      switch (x.count) {
        case 1:
          return multiply_flat_vectors<Products, Bits, 1>(rows, x.digits, sums, stride);
        case 2:
          return multiply_flat_vectors<Products, Bits, 2>(rows, x.digits, sums, stride);
        default:
          return multiply_flat_vectors<Products, Bits, kFlatGroup>(rows, x.digits, sums, stride);
      }
    }
  });
}

// The sums of a run of patches with each vector.
template <std::size_t Vectors>
struct PatchSums {
  std::int32_t lanes[Vectors] = {};

  [[gnu::always_inline]] inline void add(std::int32_t difference, const std::int16_t* x) {
    for (std::size_t i = 0; i < Vectors; ++i) lanes[i] += difference * x[i];
  }
};

// Compilers make a vector of eight sums by themselves, but not of four.
template <>
struct PatchSums<4> {
  using Shorts = std::int16_t __attribute__((vector_size(8)));
  using Ints = std::int32_t __attribute__((vector_size(16)));
  Ints lanes = {};

  [[gnu::always_inline]] inline void add(std::int32_t difference, const std::int16_t* x) {
    Shorts whole;
    std::memcpy(&whole, x, sizeof whole);
    lanes += __builtin_convertvector(whole, Ints) * difference;
  }
};

template <std::size_t Vectors>
void add_flat_patches_of(const FlatPatches& patches, std::size_t rows, const std::int16_t* whole,
                         std::int64_t* sums) {
  for (std::size_t row = 0; row < rows; ++row, sums += Vectors) {
    std::size_t at = patches.first[row];
    const std::size_t end = patches.first[row + 1];
    const std::int16_t* x = whole;
    while (at < end) {
      const std::size_t stop = end - at < kPatchRun ? end : at + kPatchRun;
      PatchSums<Vectors> run;
      for (; at < stop; ++at) {
        x += patch_gap(patches.words[at]) * Vectors;
        run.add(patch_difference(patches.words[at]), x);
      }
      for (std::size_t i = 0; i < Vectors; ++i) sums[i] += run.lanes[i];
    }
  }
}

inline void add_flat_patches(const FlatPatches& patches, std::size_t rows,
                             const std::int16_t* whole, std::size_t count, std::int64_t* sums) {
  switch (count) {
    case 1:
      return add_flat_patches_of<1>(patches, rows, whole, sums);
    case 2:
      return add_flat_patches_of<2>(patches, rows, whole, sums);
    case 4:
      return add_flat_patches_of<4>(patches, rows, whole, sums);
    default:
      return add_flat_patches_of<8>(patches, rows, whole, sums);
  }
}

template <class Products>
constexpr FlatKernels make_flat_kernels() {
  return {.pack = pack_flat,
          .unpack = unpack_flat<typename Products::Lanes>,
          .product = multiply_flat<Products>,
          .add_patches = add_flat_patches};
}

}  // namespace
}  // namespace entrollm
