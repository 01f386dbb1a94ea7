// Products of tiles with group scales, written over FlatLanes (see flat_pack.hpp) and an
// instruction set's GroupedLanes:
//
//   struct GroupedLanes {
//     using Lanes = FlatLanes;
//     using Floats;                         // a float for every four bytes of a register
//     static constexpr std::size_t kMostVectors;  // that share the unpacking of a tile
//     static constexpr bool kTakesWhole;
//     // Exact, of the columns of a step; symbols have Bits bits. Vectors share their unpacking.
//     template <int Bits, std::size_t Vectors>
//     struct Sums {
//       void add(Lanes::Bytes symbols, const std::int8_t* x);  // kStepBytes of a vector
//       Floats floats() const;              // the sums so far, rounded to float32
//     };
//     static Floats load(const float*);
//     static void store(float*, Floats);
//     static Floats fma(Floats a, Floats b, Floats c);
//     static Floats splat(float);
//     static void widen_halves(const std::uint16_t* halves, std::size_t count, float* out);
//     static void transpose(const float* rows, std::size_t groups, float* out);
//   };
#pragma once

#include "kernels/generic/flat_pack.hpp"
#include "kernels/generic/group_terms.hpp"
#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

// As kFlatAhead.
inline constexpr std::size_t kGroupedAhead = 8192;

// Fields that are the symbols.
template <class Lanes, int Bits>
struct PlainFields {
  static constexpr int kBits = Bits;
  static constexpr int kSymbolBits = Bits;

  [[gnu::always_inline]] inline explicit PlainFields(const GroupedTile&) {}

  template <std::size_t Register>
  [[gnu::always_inline]] inline typename Lanes::Bytes symbols(const std::uint8_t* chunk) const {
    return Lanes::template fields<Bits, Register>(chunk);
  }
};

// Fields that look symbols up in a table.
template <class Lanes, int Bits, int SymbolBits>
struct TableFields {
  static constexpr int kBits = Bits;
  static constexpr int kSymbolBits = SymbolBits;

  [[gnu::always_inline]] inline explicit TableFields(const GroupedTile& tile)
      : table(Lanes::load_table(tile.table)) {}

  template <std::size_t Register>
  [[gnu::always_inline]] inline typename Lanes::Bytes symbols(const std::uint8_t* chunk) const {
    return Lanes::look_up(table, Lanes::template fields<Bits, Register>(chunk));
  }

  const typename Lanes::Table table;
};

// The totals of a tile with Vectors vectors, kept in registers.
template <class Isa, class Fields, std::size_t Vectors>
class GroupedTotals {
 public:
  [[gnu::always_inline]] inline GroupedTotals() {
    each([&]<std::size_t Vector, std::size_t Register>()
             __attribute__((always_inline)) { totals_[Vector][Register] = Isa::splat(0.0f); });
  }

  [[gnu::always_inline]] inline void store(float* out) const {
    each([&]<std::size_t Vector, std::size_t Register>() __attribute__((always_inline)) {
      Isa::store(out + Vector * kGroupedRows + Register * kFloats, totals_[Vector][Register]);
    });
  }

  // `sums` are those of a group, `stride` floats from a vector to the next.
  [[gnu::always_inline]] inline void add_shift(const float* shifts, const float* sums,
                                               std::size_t stride) {
    each([&]<std::size_t Vector, std::size_t Register>() __attribute__((always_inline)) {
      Floats& total = totals_[Vector][Register];
      total = Isa::fma(Isa::load(shifts + Register * kFloats), Isa::splat(sums[Vector * stride]),
                       total);
    });
  }

  // `x_step` bytes are from a step's activations to the next one's.
  [[gnu::always_inline]] inline void add_run(const Fields& fields, const std::uint8_t* chunk,
                                             std::size_t steps, const std::int8_t* x,
                                             std::size_t x_step, const float* scales) {
    Sums sums[Vectors][kRegisters];
    for (std::size_t i = 0; i < steps; ++i, chunk += kChunkBytes, x += x_step) {
      __builtin_prefetch(chunk + kGroupedAhead, 0, 2);
      for_flat_registers<Lanes>([&]<std::size_t Register>() __attribute__((always_inline)) {
        const auto symbols = fields.template symbols<Register>(chunk);
        [&]<std::size_t... V>(std::index_sequence<V...>) __attribute__((always_inline)) {
          (sums[V][Register].add(symbols, x + V * kStepBytes), ...);
        }(std::make_index_sequence<Vectors>());
      });
    }
    each([&]<std::size_t Vector, std::size_t Register>() __attribute__((always_inline)) {
      Floats& total = totals_[Vector][Register];
      total =
          Isa::fma(sums[Vector][Register].floats(), Isa::load(scales + Register * kFloats), total);
    });
  }

 private:
  using Lanes = typename Isa::Lanes;
  using Floats = typename Isa::Floats;
  using Sums = typename Isa::template Sums<Fields::kSymbolBits, Vectors>;
  static constexpr std::size_t kRegisters = kVector / Lanes::kLanes;
  static constexpr std::size_t kFloats = Lanes::kLanes / kStepColumns;
  static constexpr std::size_t kChunkBytes = flat_chunk_bytes(Fields::kBits);

  template <class Body>
  [[gnu::always_inline]] static inline void each(const Body& body) {
    [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
      (body.template operator()<I / kRegisters, I % kRegisters>(), ...);
    }(std::make_index_sequence<Vectors * kRegisters>());
  }

  Floats totals_[Vectors][kRegisters];
};

// Vectors from `first` on.
template <class Isa, class Fields, std::size_t Vectors>
[[gnu::noinline]] void multiply_grouped_vectors(const GroupedTile& tile, const GroupedVectors& x,
                                                std::size_t first, float* out) {
  const Fields fields(tile);
  const std::size_t x_step = x.count * kStepBytes;
  const std::int8_t* digits = x.digits + first * kStepBytes;
  const std::uint8_t* chunk = tile.fields;
  const float *scales = tile.scales, *shifts = tile.shifts;
  const float* sums = x.sums + first * x.sums_stride;
  GroupedTotals<Isa, Fields, Vectors> totals;
  for (std::size_t left = tile.steps; left > 0; scales += kGroupedRows, ++sums) {
    if (shifts != nullptr) {
      totals.add_shift(shifts, sums, x.sums_stride);
      shifts += kGroupedRows;
    }
    std::size_t group_left = left < tile.group_steps ? left : tile.group_steps;
    left -= group_left;
    while (group_left > 0) {
      const std::size_t steps = group_left < kGroupedRun ? group_left : kGroupedRun;
      totals.add_run(fields, chunk, steps, digits, x_step, scales);
      chunk += steps * flat_chunk_bytes(Fields::kBits);
      digits += steps * x_step;
      group_left -= steps;
    }
  }
  totals.store(out + first * kGroupedRows);
}

template <class Isa, class Fields, std::size_t Vectors>
void multiply_grouped_in_turns(const GroupedTile& tile, const GroupedVectors& x, float* totals) {
  constexpr std::size_t kTogether = Vectors < Isa::kMostVectors ? Vectors : Isa::kMostVectors;
  for (std::size_t first = 0; first < Vectors; first += kTogether) {
    multiply_grouped_vectors<Isa, Fields, kTogether>(tile, x, first, totals);
  }
}

template <class Isa, class Fields>
void multiply_grouped_batch(const GroupedTile& tile, const GroupedVectors& x, float* totals) {
  switch (x.count) {
    case 1:
      return multiply_grouped_in_turns<Isa, Fields, 1>(tile, x, totals);
    case 2:
      return multiply_grouped_in_turns<Isa, Fields, 2>(tile, x, totals);
    case 4:
      return multiply_grouped_in_turns<Isa, Fields, 4>(tile, x, totals);
    default:
      return multiply_grouped_in_turns<Isa, Fields, 8>(tile, x, totals);
  }
}

template <class Isa>
void multiply_grouped_tile(const GroupedTile& tile, const GroupedVectors& x, float* totals) {
  using Lanes = typename Isa::Lanes;
  if (tile.table == nullptr) {
    return with_flat_width(tile.bits, [&]<int Bits>() __attribute__((always_inline)) {
      multiply_grouped_batch<Isa, PlainFields<Lanes, Bits>>(tile, x, totals);
    });
  }
  const bool is_byte = tile.symbol_bits == 8;
  if (tile.bits == 3) {
    return is_byte ? multiply_grouped_batch<Isa, TableFields<Lanes, 3, 8>>(tile, x, totals)
                   : multiply_grouped_batch<Isa, TableFields<Lanes, 3, 7>>(tile, x, totals);
  }
  is_byte ? multiply_grouped_batch<Isa, TableFields<Lanes, 4, 8>>(tile, x, totals)
          : multiply_grouped_batch<Isa, TableFields<Lanes, 4, 7>>(tile, x, totals);
}

template <class Isa>
constexpr GroupedKernels make_grouped_kernels() {
  return {.takes_whole = Isa::kTakesWhole,
          .product = multiply_grouped_tile<Isa>,
          .terms = write_group_terms<Isa::widen_halves>,
          .transpose = Isa::transpose};
}

}  // namespace
}  // namespace entrollm
