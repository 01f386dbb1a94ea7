// Decodes and multiplies in one pass. The root's symbols go from registers into the dot products;
// only the short lists below the root are written to memory.
#include <utility>

#include "kernels/x86/avx512_cascade.hpp"
#include "kernels/x86/avx512_parts.hpp"
#include "kernels/x86/avx512_sums.hpp"

namespace entrollm {
namespace {

// Products of weights with the digits of one, two or four activation vectors. Packs are expanded in
// member functions: in a lambda that captures `this`, GCC 12 keeps the sums in memory.
template <std::size_t Columns>
class ColumnSums {
 public:
  // Bytes of digits for a vector of weights, and so from a step to the next.
  static constexpr std::size_t kDigits = Columns * 2 * kVector;

  template <int Step>
  void add(__m512i weights, const std::int8_t* digits) {
    add_columns<Step>(weights, digits + Step * kDigits, std::make_index_sequence<Columns>());
  }

  // Adds the totals to `sums`, one for each column.
  void add_to(std::int64_t* sums) const { add_totals(sums, std::make_index_sequence<Columns>()); }

 private:
  template <int Step, std::size_t... Column>
  void add_columns(__m512i weights, const std::int8_t* digits, std::index_sequence<Column...>) {
    (sums_.add<Step * Columns % 4 + Column>(weights, digits + Column * 2 * kVector,
                                            digits + (Column * 2 + 1) * kVector),
     ...);
  }

  template <std::size_t... Column>
  void add_totals(std::int64_t* sums, std::index_sequence<Column...>) const {
    ((sums[Column] += sums_.total<Columns, Column>()), ...);
  }

  DigitSums sums_;
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

    // Rows that end inside an eight: the whole block is decoded before it is multiplied.
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
