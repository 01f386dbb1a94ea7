// Products of flat rows with group scales, written over FlatLanes (see flat_pack.hpp) and an
// instruction set's GroupedLanes:
//
//   struct GroupedLanes {
//     using Lanes = FlatLanes;
//     using Floats;                         // a float for every four bytes of a register
//     static constexpr std::size_t kMostVectors;  // that share the unpacking of a row
//     // Exact, of four columns each; symbols have Bits bits, and Vectors share their unpacking.
//     template <int Bits, std::size_t Vectors>
//     struct Sums {
//       void add(Lanes::Bytes symbols, const std::int8_t* high, const std::int8_t* low);
//       Floats floats() const;              // the sums so far, rounded to float32
//     };
//     static constexpr auto kReorder;       // see GroupedKernels::reorder
//     static Floats load(const float*);
//     static void store(float*, Floats);
//     static Floats fma(Floats a, Floats b, Floats c);
//     static Floats splat(float);
//     static void widen_halves(const std::uint16_t* halves, std::size_t count, float* out);
//     // The totals of kTotalRows rows of lanes, `stride` floats apart, as grouped_total adds them.
//     static void add_lanes(const float* lanes, std::size_t stride, float* totals);
//     // The scale of each lane of a register that covers several groups of Size columns.
//     template <std::size_t Size>
//     static Floats spread(const float* scales);
//   };
#pragma once

#include <cstring>

#include "kernels/generic/flat_pack.hpp"
#include "kernels/generic/group_terms.hpp"
#include "kernels/grouped_kernels.hpp"

namespace entrollm {
namespace {

// As kFlatAhead.
inline constexpr std::size_t kGroupedAhead = 8192;

inline constexpr std::size_t kTotalRows = 8;

// Fields that are the symbols.
template <class Lanes, int Bits>
struct PlainFields {
  static constexpr int kBits = Bits;
  static constexpr int kSymbolBits = Bits;

  [[gnu::always_inline]] inline explicit PlainFields(const GroupedRows&) {}

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

  [[gnu::always_inline]] inline explicit TableFields(const GroupedRows& rows)
      : table(Lanes::load_table(rows.table)) {}

  template <std::size_t Register>
  [[gnu::always_inline]] inline typename Lanes::Bytes symbols(const std::uint8_t* chunk) const {
    return Lanes::look_up(table, Lanes::template fields<Bits, Register>(chunk));
  }

  const typename Lanes::Table table;
};

template <class Isa, class Fields, std::size_t Vectors>
class GroupedRow {
 public:
  using Lanes = typename Isa::Lanes;
  using Floats = typename Isa::Floats;
  static constexpr std::size_t kRegisters = kVector / Lanes::kLanes;
  static constexpr std::size_t kFloats = Lanes::kLanes / 4;
  static constexpr std::size_t kChunkBytes = flat_chunk_bytes(Fields::kBits);
  using Sums = typename Isa::template Sums<Fields::kSymbolBits, Vectors>;

  [[gnu::always_inline]] inline GroupedRow(const Fields& fields, const float* lanes,
                                           std::size_t digits_step)
      : fields_(fields), digits_step_(digits_step) {
    each([&]<std::size_t I>() __attribute__((always_inline)) {
      lanes_[I / kRegisters][I % kRegisters] = Isa::load(lanes + I * kFloats);
    });
  }

  [[gnu::always_inline]] inline void store(float* lanes) const {
    each([&]<std::size_t I>() __attribute__((always_inline)) {
      Isa::store(lanes + I * kFloats, lanes_[I / kRegisters][I % kRegisters]);
    });
  }

  // A chunk of groups of Size columns, a part of kVector.
  template <std::size_t Size>
  [[gnu::always_inline]] inline void add_small(const std::uint8_t* fields,
                                               const std::int8_t* digits, const float* scales) {
    __builtin_prefetch(fields + kGroupedAhead, 0, 2);
    for_flat_registers<Lanes>([&]<std::size_t Register>() __attribute__((always_inline)) {
      const auto weights = fields_.template symbols<Register>(fields);
      const Floats scale = scale_of<Size, Register>(scales);
      for_vectors([&]<std::size_t Vector>() __attribute__((always_inline)) {
        Sums sums;
        add<Register, Vector>(sums, weights, digits);
        Floats& lane = lanes_[Vector][Register];
        lane = Isa::fma(sums.floats(), scale, lane);
      });
    });
  }

  // A run of chunks of one group.
  [[gnu::always_inline]] inline void add_run(const std::uint8_t* fields, const std::int8_t* digits,
                                             std::size_t chunks, float scale) {
    Sums sums[Vectors][kRegisters];
    for (std::size_t i = 0; i < chunks; ++i, fields += kChunkBytes, digits += digits_step_) {
      __builtin_prefetch(fields + kGroupedAhead, 0, 2);
      for_flat_registers<Lanes>([&]<std::size_t Register>() __attribute__((always_inline)) {
        const auto weights = fields_.template symbols<Register>(fields);
        for_vectors([&]<std::size_t Vector>() __attribute__((always_inline)) {
          add<Register, Vector>(sums[Vector][Register], weights, digits);
        });
      });
    }
    each([&]<std::size_t I>() __attribute__((always_inline)) {
      Floats& lane = lanes_[I / kRegisters][I % kRegisters];
      lane = Isa::fma(sums[I / kRegisters][I % kRegisters].floats(), Isa::splat(scale), lane);
    });
  }

 private:
  template <class Body>
  [[gnu::always_inline]] static inline void each(const Body& body) {
    [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
      (body.template operator()<I>(), ...);
    }(std::make_index_sequence<Vectors * kRegisters>());
  }

  template <class Body>
  [[gnu::always_inline]] static inline void for_vectors(const Body& body) {
    [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
      (body.template operator()<I>(), ...);
    }(std::make_index_sequence<Vectors>());
  }

  template <std::size_t Register, std::size_t Vector>
  [[gnu::always_inline]] static inline void add(Sums& sums, typename Lanes::Bytes weights,
                                                const std::int8_t* digits) {
    const std::int8_t* high = digits + 2 * Vector * kVector + Register * Lanes::kLanes;
    sums.add(weights, high, high + kVector);
  }

  template <std::size_t Size, std::size_t Register>
  [[gnu::always_inline]] static inline Floats scale_of(const float* scales) {
    constexpr std::size_t kFirst = Register * Lanes::kLanes / Size;
    if constexpr (Size >= Lanes::kLanes) {
      return Isa::splat(scales[kFirst]);
    } else {
      return Isa::template spread<Size>(scales + kFirst);
    }
  }

  const Fields fields_;
  const std::size_t digits_step_;
  Floats lanes_[Vectors][kRegisters];
};

template <class Isa, class Fields, std::size_t Vectors, std::size_t Size>
[[gnu::noinline]] void multiply_small_groups(const GroupedRows& rows, const std::int8_t* digits,
                                             std::size_t step, float* lanes, std::size_t stride) {
  const Fields table(rows);
  for (std::size_t row = 0; row < rows.rows; ++row, lanes += stride) {
    GroupedRow<Isa, Fields, Vectors> tile(table, lanes, step);
    const std::uint8_t* fields = rows.fields + row * rows.row_bytes;
    const float* scales =
        rows.scales + row * rows.scale_stride + rows.first_chunk * (kVector / Size);
    const std::int8_t* x = digits;
    for (std::size_t i = 0; i < rows.chunks; ++i) {
      tile.template add_small<Size>(fields, x, scales);
      fields += flat_chunk_bytes(Fields::kBits);
      scales += kVector / Size;
      x += step;
    }
    tile.store(lanes);
  }
}

template <class Isa, class Fields, std::size_t Vectors>
[[gnu::noinline]] void multiply_large_groups(const GroupedRows& rows, const std::int8_t* digits,
                                             std::size_t step, float* lanes, std::size_t stride) {
  const std::size_t group_chunks = rows.group_columns / kVector;
  const std::size_t end = rows.first_chunk + rows.chunks;
  const Fields table(rows);
  for (std::size_t row = 0; row < rows.rows; ++row, lanes += stride) {
    GroupedRow<Isa, Fields, Vectors> tile(table, lanes, step);
    const std::uint8_t* fields = rows.fields + row * rows.row_bytes;
    const std::int8_t* x = digits;
    std::size_t group = rows.first_chunk / group_chunks;
    std::size_t group_end = (group + 1) * group_chunks;
    std::size_t run_end = rows.first_chunk + kGroupedRun;
    for (std::size_t at = rows.first_chunk; at < end;) {
      std::size_t stop = group_end < run_end ? group_end : run_end;
      if (stop > end) stop = end;
      const std::size_t chunks = stop - at;
      tile.add_run(fields, x, chunks, rows.scales[row * rows.scale_stride + group]);
      fields += chunks * flat_chunk_bytes(Fields::kBits);
      x += chunks * step;
      at = stop;
      if (at == group_end) {
        ++group;
        group_end += group_chunks;
      }
      if (at == run_end) run_end += kGroupedRun;
    }
    tile.store(lanes);
  }
}

template <class Isa, class Fields, std::size_t Vectors>
void multiply_grouped_vectors(const GroupedRows& rows, const FlatVectors& x, float* lanes) {
  constexpr std::size_t kTogether = Vectors < Isa::kMostVectors ? Vectors : Isa::kMostVectors;
  constexpr std::size_t kStep = 2 * Vectors * kVector;
  constexpr std::size_t kStride = Vectors * kGroupedLanes;
  for (std::size_t vector = 0; vector < Vectors; vector += kTogether) {
    const std::int8_t* digits = x.digits + 2 * vector * kVector;
    float* out = lanes + vector * kGroupedLanes;
    switch (rows.group_columns) {
      case 8:
        multiply_small_groups<Isa, Fields, kTogether, 8>(rows, digits, kStep, out, kStride);
        break;
      case 16:
        multiply_small_groups<Isa, Fields, kTogether, 16>(rows, digits, kStep, out, kStride);
        break;
      case 32:
        multiply_small_groups<Isa, Fields, kTogether, 32>(rows, digits, kStep, out, kStride);
        break;
      default:
        multiply_large_groups<Isa, Fields, kTogether>(rows, digits, kStep, out, kStride);
    }
  }
}

template <class Isa, class Fields>
void multiply_grouped_batch(const GroupedRows& rows, const FlatVectors& x, float* lanes) {
  switch (x.count) {
    case 1:
      return multiply_grouped_vectors<Isa, Fields, 1>(rows, x, lanes);
    case 2:
      return multiply_grouped_vectors<Isa, Fields, 2>(rows, x, lanes);
    case 4:
      return multiply_grouped_vectors<Isa, Fields, 4>(rows, x, lanes);
    default:
      return multiply_grouped_vectors<Isa, Fields, 8>(rows, x, lanes);
  }
}

template <class Isa>
void multiply_grouped_rows(const GroupedRows& rows, const FlatVectors& x, float* lanes) {
  using Lanes = typename Isa::Lanes;
  if (rows.table == nullptr) {
    return with_flat_width(rows.bits, [&]<int Bits>() __attribute__((always_inline)) {
      multiply_grouped_batch<Isa, PlainFields<Lanes, Bits>>(rows, x, lanes);
    });
  }
  const bool is_byte = rows.symbol_bits == 8;
  if (rows.bits == 3) {
    return is_byte ? multiply_grouped_batch<Isa, TableFields<Lanes, 3, 8>>(rows, x, lanes)
                   : multiply_grouped_batch<Isa, TableFields<Lanes, 3, 7>>(rows, x, lanes);
  }
  is_byte ? multiply_grouped_batch<Isa, TableFields<Lanes, 4, 8>>(rows, x, lanes)
          : multiply_grouped_batch<Isa, TableFields<Lanes, 4, 7>>(rows, x, lanes);
}

// The lanes of a row that `Vectors` vectors begin with.
template <class Isa, std::size_t Vectors>
[[gnu::always_inline]] inline void begin_grouped_row(const float* shift, const float* sums,
                                                     std::size_t stride, float* lanes) {
  constexpr std::size_t kFloats = Isa::Lanes::kLanes / 4;
  constexpr std::size_t kParts = kGroupedLanes / kFloats;
  typename Isa::Floats parts[Vectors][kParts];
  for (auto& vector : parts) {
    for (auto& part : vector) part = Isa::splat(0.0f);
  }
  for (std::size_t i = 0; i < stride; i += kGroupedLanes) {
    for (std::size_t k = 0; k < kParts; ++k) {
      const std::size_t at = i + k * kFloats;
      const auto factor = Isa::load(shift + at);
      for (std::size_t v = 0; v < Vectors; ++v) {
        parts[v][k] = Isa::fma(factor, Isa::load(sums + v * stride + at), parts[v][k]);
      }
    }
  }
  for (std::size_t v = 0; v < Vectors; ++v) {
    for (std::size_t k = 0; k < kParts; ++k) {
      Isa::store(lanes + v * kGroupedLanes + k * kFloats, parts[v][k]);
    }
  }
}

template <class Isa>
void begin_grouped_lanes(const GroupedShifts& shifts, std::size_t rows, std::size_t vectors,
                         float* lanes) {
  if (shifts.shifts == nullptr) {
    std::memset(lanes, 0, rows * vectors * kGroupedLanes * sizeof *lanes);
    return;
  }
  const std::size_t stride = shifts.sums_stride;
  for (std::size_t row = 0; row < rows; ++row) {
    const float* shift = shifts.shifts + row * shifts.groups;
    const float* sums = shifts.sums;
    if (vectors < 4) {
      for (std::size_t v = 0; v < vectors; ++v, sums += stride, lanes += kGroupedLanes) {
        begin_grouped_row<Isa, 1>(shift, sums, stride, lanes);
      }
      continue;
    }
    for (std::size_t v = 0; v < vectors; v += 4, sums += 4 * stride, lanes += 4 * kGroupedLanes) {
      begin_grouped_row<Isa, 4>(shift, sums, stride, lanes);
    }
  }
}

template <class Isa>
void write_grouped_totals(const float* lanes, const GroupedTotals& totals) {
  const std::size_t stride = totals.vectors * kGroupedLanes;
  for (std::size_t b = 0; b < totals.batch; ++b) {
    float* out = totals.out + b * totals.stride;
    const float* row_lanes = lanes + b * kGroupedLanes;
    const double scale = totals.scales[b];
    std::size_t row = 0;
    for (; row + kTotalRows <= totals.rows; row += kTotalRows, row_lanes += kTotalRows * stride) {
      float some[kTotalRows];
      Isa::add_lanes(row_lanes, stride, some);
      for (std::size_t k = 0; k < kTotalRows; ++k) {
        out[row + k] = static_cast<float>(some[k] * scale);
      }
    }
    for (; row < totals.rows; ++row, row_lanes += stride) {
      out[row] = static_cast<float>(grouped_total(row_lanes) * scale);
    }
  }
}

template <class Isa>
constexpr GroupedKernels make_grouped_kernels() {
  return {.reorder = Isa::kReorder,
          .product = multiply_grouped_rows<Isa>,
          .begin = begin_grouped_lanes<Isa>,
          .totals = write_grouped_totals<Isa>,
          .terms = write_group_terms<Isa::widen_halves>};
}

}  // namespace
}  // namespace entrollm
