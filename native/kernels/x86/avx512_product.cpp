// Decode and multiply in one pass: the root's symbols go from registers into the dot products, and
// only the short lists below it are written to memory.
#include <utility>

#include "kernels/x86/avx512_cascade.hpp"
#include "kernels/x86/avx512_parts.hpp"

namespace entrollm {
namespace {

// Products of weights with the digits of one, two or four activation vectors. Eight accumulators do
// not wait for each other; indices are constants throughout, which keeps them in registers.
template <std::size_t Columns>
struct ColumnSums {
  static constexpr std::size_t kSets = 4 / Columns;  // of accumulators, taken in turn
  // Bytes of digits for a vector of weights, and so from a step to the next.
  static constexpr std::size_t kDigits = Columns * 2 * kVector;
  __m512i high[4];
  __m512i low[4];

  ColumnSums()
      : high{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
             _mm512_setzero_si512()},
        low{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
            _mm512_setzero_si512()} {}

  template <int Step>
  void add(__m512i weights, const std::int8_t* digits) {
    add_columns<Step>(weights, digits, std::make_index_sequence<Columns>());
  }

  // Adds the totals to `sums`, one for each column.
  void add_to(std::int64_t* sums) const { add_totals(sums, std::make_index_sequence<Columns>()); }

 private:
  template <int Step, std::size_t... Column>
  void add_columns(__m512i weights, const std::int8_t* digits, std::index_sequence<Column...>) {
    constexpr std::size_t kSet = Step % kSets * Columns;
    const std::int8_t* at = digits + Step * kDigits;
    ((add_products(high[kSet + Column], weights, load(at + Column * 2 * kVector)),
      add_products(low[kSet + Column], weights, load(at + (Column * 2 + 1) * kVector))),
     ...);
  }

  template <std::size_t... Column>
  void add_totals(std::int64_t* sums, std::index_sequence<Column...>) const {
    ((sums[Column] += reduce_digits(total<Column>(high), total<Column>(low))), ...);
  }

  template <std::size_t Column>
  static __m512i total(const __m512i (&v)[4]) {
    if constexpr (Columns == 4) return v[Column];
    if constexpr (Columns == 2) return _mm512_add_epi32(v[Column], v[Column + 2]);
    return _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3]));
  }
};

template <std::size_t Columns>
struct For {
  using Sums = ColumnSums<Columns>;

  // Multiplies a block with the digits of its columns and adds to the sums of its rows.
  template <int Bits, bool Escape, int Low>
  struct Multiply {
    static std::size_t run(const CascadeBlock& block, const std::int8_t* digits,
                           std::uint8_t* buffer, std::int64_t* sums) {
      if (block.vectors % 8 != 0) return buffered(block, digits, buffer, sums);
      RootDecoder<Bits, Escape, Low> root(block.root, block.low_fields);
      const std::size_t eights = block.vectors / 8;
      for (std::size_t row = 0; row < block.rows; ++row) {
        Sums dot;
        const std::int8_t* at = digits;
        for_eights<Bits, Low>(block.root.fields, row * eights, eights,
                              [&]<int Step>(std::size_t eight) {
                                dot.template add<Step>(root.template next<Step>(eight), at);
                                if constexpr (Step == 7) at += 8 * Sums::kDigits;
                              });
        dot.add_to(sums + row * Columns);
      }
      return root.escapes;
    }

    // Rows that end inside a group of eight vectors: decode the block first.
    static std::size_t buffered(const CascadeBlock& block, const std::int8_t* digits,
                                std::uint8_t* buffer, std::int64_t* sums) {
      RootDecoder<Bits, Escape, Low> root(block.root, block.low_fields);
      for_vectors(block.rows * block.vectors, [&]<int Step>(std::size_t eight) {
        store(buffer + (eight * 8 + Step) * kVector, root.template next<Step>(eight));
      });
      for (std::size_t row = 0; row < block.rows; ++row) {
        Sums dot;
        const std::uint8_t* weights = buffer + row * block.vectors * kVector;
        for_vectors(block.vectors, [&]<int Step>(std::size_t eight) {
          dot.template add<Step>(load(weights + (eight * 8 + Step) * kVector),
                                 digits + eight * 8 * Sums::kDigits);
        });
        dot.add_to(sums + row * Columns);
      }
      return root.escapes;
    }
  };
};

template <std::size_t Columns>
std::size_t multiply_run(const CascadeRun& run, std::int64_t* sums) {
  const auto multiply = choose_action<For<Columns>::template Multiply>(*run.code);
  return for_blocks_of(run, [&](const CascadeBlock& block) {
    std::int64_t* block_sums = sums + block.first_row * Columns;
    if (block.part == 0) {
      for (std::size_t i = 0; i < block.rows * Columns; ++i) block_sums[i] = 0;
    }
    const std::size_t first_vector = block.part * run.block_columns / kVector;
    return multiply(block, run.digits + first_vector * ColumnSums<Columns>::kDigits, run.buffer,
                    block_sums);
  });
}

}  // namespace

std::size_t cascade_product(const CascadeRun& run, std::int64_t* sums) {
  if (run.columns == 1) return multiply_run<1>(run, sums);
  return run.columns == 2 ? multiply_run<2>(run, sums) : multiply_run<4>(run, sums);
}

}  // namespace entrollm
