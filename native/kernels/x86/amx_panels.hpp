// Multiplies panels with one or two digit groups, a step at a time, so that the matrix unit works
// while other instructions decode.
#pragma once

#include "kernels/x86/amx.hpp"

namespace entrollm {

namespace {

// Multiplies some panels with all digit groups of a product, of which there are one or two. Tiles
// must be configured while it is used.
class PanelFeeder {
 public:
  // Rows [row, end) of the product, whose panels begin at `panels`.
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

  // Does a quarter of a step; quarters 0 to 3 follow each other. A step multiplies one vector of a
  // panel. With other work between them, the loads and the products do not wait for each other.
  [[gnu::always_inline]] void quarter(std::size_t number) {
    if (left_ == 0) return;
    const bool two_groups = product_.digit_groups > 1;
    if (number == 0) _tile_loadd(4, panel_, kTileStride);
    if (number == 1) _tile_loadd(6, digits_, kTileStride);
    if (number == 2 && two_groups) {
      _tile_loadd(7, digits_ + product_.vectors * kPanelStep, kTileStride);
    }
    if (number != 3) return;
    _tile_dpbusd(0, 4, 6);
    if (two_groups) _tile_dpbusd(1, 4, 7);
    panel_ += kPanelStep;
    digits_ += kPanelStep;
    if (--left_ == 0) end_range();
  }

  // Does what is left. A step that has begun starts over.
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

  // Begins with as many vectors of the panel as 32-bit sums can hold.
  void begin_range() {
    const std::size_t rest = product_.vectors - vector_;
    left_ = rest < kMaxVectors ? rest : kMaxVectors;
    panel_ = rows_.panels + vector_ * kPanelStep;
    digits_ = product_.digits + vector_ * kPanelStep;
    vector_ += left_;
    _tile_zero(0);
    _tile_zero(1);
  }

  // Not inlined, to keep the loops that contain the steps small.
  [[gnu::noinline]] void end_range() {
    alignas(64) TileSums sums[kMostFusedDigitGroups];
    _tile_stored(0, sums[0], kTileStride);
    _tile_stored(1, sums[1], kTileStride);
    for (std::size_t i = 0; i < product_.digit_groups; ++i) {
      add_sums(sums[i], product_, i, rows_.row, rows_.end);
    }
    if (vector_ < product_.vectors) return begin_range();
    rows_.row += kPanelRows;
    rows_.panels += product_.vectors * kPanelStep;
    if (rows_.row < rows_.end) begin_panel();
  }

  const PanelProduct product_;
  Rows rows_{};
  const std::uint8_t* panel_ = nullptr;
  const std::int8_t* digits_ = nullptr;
  std::size_t vector_ = 0;  // of the panel, where the next range begins
  std::size_t left_ = 0;    // vectors of this range
};

}  // namespace
}  // namespace entrollm
