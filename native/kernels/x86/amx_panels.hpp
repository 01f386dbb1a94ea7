// Panels times one or two groups, a step at a time: the matrix unit works beside other
// instructions.
#pragma once

#include "kernels/x86/amx.hpp"

namespace entrollm {
namespace {

// Multiplies some panels with all groups of a product, of which there are one or two. Tiles must be
// configured while it is used.
class PanelFeeder {
 public:
  // What it multiplies: rows [row, end) of the product, whose panels begin at `panels`.
  struct Rows {
    const std::uint8_t* panels;
    std::size_t row;
    std::size_t end;
  };

  explicit PanelFeeder(const PanelProduct& product) : product_(product) {}

  void begin(const Rows& rows) {
    rows_ = rows;
    if (rows.row < rows.end) begin_panel();
  }

  // A quarter of a step, which multiplies one vector of a panel; quarters 0 to 3 follow each other.
  // Spread over other work, the loads and the products do not wait for each other.
  [[gnu::always_inline]] void quarter(std::size_t number) {
    if (left_ == 0) return;
    const bool two_groups = product_.groups > 1;
    if (number == 0) _tile_loadd(4, panel_, kTileStride);
    if (number == 1) _tile_loadd(6, group_, kTileStride);
    if (number == 2 && two_groups) {
      _tile_loadd(7, group_ + product_.vectors * kPanelStep, kTileStride);
    }
    if (number != 3) return;
    _tile_dpbusd(0, 4, 6);
    if (two_groups) _tile_dpbusd(1, 4, 7);
    panel_ += kPanelStep;
    group_ += kPanelStep;
    if (--left_ == 0) end_range();
  }

  // What is left; a step in progress starts over.
  void finish() {
    while (left_ != 0) {
      for (std::size_t number = 0; number < 4; ++number) quarter(number);
    }
  }

 private:
  void begin_panel() {
    vector_ = 0;
    begin_range();
  }

  // As many vectors of the panel as 32-bit sums take.
  void begin_range() {
    const std::size_t rest = product_.vectors - vector_;
    left_ = rest < kMaxVectors ? rest : kMaxVectors;
    panel_ = rows_.panels + vector_ * kPanelStep;
    group_ = product_.packed + vector_ * kPanelStep;
    vector_ += left_;
    _tile_zero(0);
    _tile_zero(1);
  }

  // Out of line, so that the steps do not crowd the loops that they stand in.
  [[gnu::noinline]] void end_range() {
    alignas(64) TileSums sums[kMostFedGroups];
    _tile_stored(0, sums[0], kTileStride);
    _tile_stored(1, sums[1], kTileStride);
    for (std::size_t group = 0; group < product_.groups; ++group) {
      add_sums(sums[group], product_, group, rows_.row, rows_.end);
    }
    if (vector_ < product_.vectors) return begin_range();
    rows_.row += kPanelRows;
    rows_.panels += product_.vectors * kPanelStep;
    if (rows_.row < rows_.end) begin_panel();
  }

  const PanelProduct product_;
  Rows rows_{};
  const std::uint8_t* panel_ = nullptr;
  const std::int8_t* group_ = nullptr;
  std::size_t vector_ = 0;  // of the panel, at which the next range begins
  std::size_t left_ = 0;    // vectors of this range
};

}  // namespace
}  // namespace entrollm
