// Decodes cascade codes into panels, for products that use every weight several times.
#include "kernels/x86/amx_panels.hpp"

#include "kernels/x86/amx_parts.hpp"
#include "kernels/x86/avx512_cascade.hpp"

namespace entrollm {
namespace {

// Where the vectors of a block's rows go.
struct PanelRows {
  std::uint8_t* panels;
  std::size_t row_vectors;   // of a whole row of the matrix
  std::size_t first_row;     // in the panels
  std::size_t first_vector;  // in the row

  std::uint8_t* at(std::size_t row) const {
    return panels + panel_offset(first_row + row, first_vector, row_vectors);
  }
};

std::size_t row_vectors_of(const CascadeRun& run) {
  return ((run.parts - 1) * run.block_columns + run.last_columns) / kVector;
}

// A panel has sixteen rows, and multiplying it takes as many steps as a row has vectors. So sixteen
// vectors are decoded for each step, and four of them for a quarter of it.
template <int Step>
[[gnu::always_inline]] inline void feed(std::size_t eight, PanelFeeder& feeder) {
  if constexpr (Step % 4 == 3) feeder.quarter(eight % 2 * 2 + Step / 4);
}

template <int Bits, bool Escape, int Low>
struct Store {
  static std::size_t run(const CascadeBlock& block, const PanelRows& out, PanelFeeder& feeder) {
    if (block.vectors % 8 != 0) return uneven(block, out, feeder);
    RootDecoder<Bits, Escape, Low> root(block.root, block.low_fields);
    const std::size_t eights = block.vectors / 8;
    for (std::size_t row = 0; row < block.rows; ++row) {
      std::uint8_t* at = out.at(row);
      for_eights<Bits, Low>(block.root.fields, row * eights, eights,
                            [&]<int Step>(std::size_t eight) {
                              store(at + Step * kPanelStep, root.template next<Step>(eight));
                              if constexpr (Step == 7) at += 8 * kPanelStep;
                              feed<Step>(eight, feeder);
                            });
    }
    return root.escapes;
  }

  // Rows that end inside an eight.
  static std::size_t uneven(const CascadeBlock& block, const PanelRows& out, PanelFeeder& feeder) {
    RootDecoder<Bits, Escape, Low> root(block.root, block.low_fields);
    std::size_t row = 0;
    std::size_t left = block.vectors;
    std::uint8_t* at = out.at(0);
    for_vectors(block.rows * block.vectors, [&]<int Step>(std::size_t eight) {
      store(at, root.template next<Step>(eight));
      at += kPanelStep;
      if (--left == 0) {
        at = out.at(++row);
        left = block.vectors;
      }
      feed<Step>(eight, feeder);
    });
    return root.escapes;
  }
};

}  // namespace

std::size_t cascade_panels(const CascadeRun& run, std::uint8_t* panels) {
  PanelFeeder idle({});
  const auto store_block = choose_action<Store>(*run.code);
  const std::size_t row_vectors = row_vectors_of(run);
  return for_blocks_of(run, [&](const CascadeBlock& block) {
    const std::size_t first_vector = block.part * run.block_columns / kVector;
    return store_block(block, {panels, row_vectors, block.first_row, first_vector}, idle);
  });
}

std::size_t cascade_digit_groups(const CascadeRun& run, const FusedPanelProduct& product) {
  const Tiles tiles;
  const std::size_t row_vectors = row_vectors_of(run);
  const std::size_t rows = (run.row_blocks - 1) * run.block_rows + run.last_rows;
  PanelFeeder feeder(
      {nullptr, rows, row_vectors, product.digits, product.digit_groups, product.sums});
  const auto store_block = choose_action<Store>(*run.code);
  const std::size_t unit_rows = product.unit * run.block_rows;
  std::uint8_t* panels = product.panels;
  std::uint8_t* others = product.panels + panel_bytes(unit_rows, row_vectors);
  std::size_t first_row = 0;  // of the unit that is decoded now
  const auto end_unit = [&](std::size_t end) {
    feeder.finish();
    feeder.begin({panels, first_row, end});
    std::uint8_t* decoded = panels;
    panels = others;
    others = decoded;
    first_row = end;
  };
  const std::size_t done = for_blocks_of(run, [&](const CascadeBlock& block) {
    if (block.first_row == first_row + unit_rows) end_unit(block.first_row);
    const std::size_t first_vector = block.part * run.block_columns / kVector;
    return store_block(block, {panels, row_vectors, block.first_row - first_row, first_vector},
                       feeder);
  });
  end_unit(rows);
  feeder.finish();
  return done;
}

}  // namespace entrollm
