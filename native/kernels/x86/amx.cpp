// Products of panels with many activation vectors.
#include "kernels/x86/amx.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "kernels/x86/amx_parts.hpp"

namespace entrollm {
namespace {

// This many vectors of two panels stay in the first-level cache while all digit groups pass.
constexpr std::size_t kDepth = 8;

// Adds the products of one or two panels with one or two digit groups to the sums in tiles 0 to 3.
// Panels are `stride` bytes apart, and so are digit groups.
template <bool TwoPanels, bool TwoGroups>
void multiply_depth(const std::uint8_t* panel, const std::int8_t* digits, std::size_t stride,
                    std::size_t vectors) {
  for (std::size_t at = 0; at < vectors * kPanelStep; at += kPanelStep) {
    _tile_loadd(4, panel + at, kTileStride);
    _tile_loadd(6, digits + at, kTileStride);
    _tile_dpbusd(0, 4, 6);
    if constexpr (TwoGroups) {
      _tile_loadd(7, digits + stride + at, kTileStride);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (TwoPanels) {
      _tile_loadd(5, panel + stride + at, kTileStride);
      _tile_dpbusd(2, 5, 6);
      if constexpr (TwoGroups) _tile_dpbusd(3, 5, 7);
    }
  }
}

// The sums of two panels with two digit groups: [panel][digit group].
struct alignas(64) Sums {
  TileSums tile[2][2];
};

struct Step {
  const std::uint8_t* panel;
  const std::int8_t* digits;
  std::size_t stride;
  std::size_t vectors;
  bool two_panels;
  bool two_groups;
  bool is_first;
};

void add_step(const Step& step, Sums& sums) {
  if (step.is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums.tile[0][0], kTileStride);
    _tile_loadd(1, sums.tile[0][1], kTileStride);
    _tile_loadd(2, sums.tile[1][0], kTileStride);
    _tile_loadd(3, sums.tile[1][1], kTileStride);
  }
  if (step.two_panels) {
    step.two_groups
        ? multiply_depth<true, true>(step.panel, step.digits, step.stride, step.vectors)
        : multiply_depth<true, false>(step.panel, step.digits, step.stride, step.vectors);
  } else {
    step.two_groups
        ? multiply_depth<false, true>(step.panel, step.digits, step.stride, step.vectors)
        : multiply_depth<false, false>(step.panel, step.digits, step.stride, step.vectors);
  }
  _tile_stored(0, sums.tile[0][0], kTileStride);
  _tile_stored(1, sums.tile[0][1], kTileStride);
  _tile_stored(2, sums.tile[1][0], kTileStride);
  _tile_stored(3, sums.tile[1][1], kTileStride);
}

// The product over vectors [first, last) of every row: at most kMaxVectors, for 32-bit sums.
void multiply_range(const PanelProduct& product, std::size_t first, std::size_t last,
                    std::vector<Sums>& sums) {
  const std::size_t pairs = (product.digit_groups + 1) / 2;
  const std::size_t stride = product.vectors * kPanelStep;
  for (std::size_t at = first; at < last; at += kDepth) {
    auto* found = sums.data();
    for (std::size_t row = 0; row < product.rows; row += 2 * kPanelRows) {
      for (std::size_t pair = 0; pair < pairs; ++pair, ++found) {
        add_step({.panel = product.panels + panel_offset(row, at, product.vectors),
                  .digits = product.digits + 2 * pair * stride + at * kPanelStep,
                  .stride = stride,
                  .vectors = last - at < kDepth ? last - at : kDepth,
                  .two_panels = row + kPanelRows < product.rows,
                  .two_groups = 2 * pair + 1 < product.digit_groups,
                  .is_first = at == first},
                 *found);
      }
    }
  }
}

}  // namespace

void panel_product(const PanelProduct& product) {
  thread_local std::vector<Sums> sums;
  const std::size_t pairs = (product.digit_groups + 1) / 2;
  sums.resize((product.rows + 2 * kPanelRows - 1) / (2 * kPanelRows) * pairs);
  for (std::size_t first = 0; first < product.vectors; first += kMaxVectors) {
    const std::size_t left = product.vectors - first;
    {
      const Tiles tiles;
      multiply_range(product, first, first + (left < kMaxVectors ? left : kMaxVectors), sums);
    }
    for (std::size_t i = 0; i < sums.size(); ++i) {
      for (std::size_t panel = 0; panel < 2; ++panel) {
        const std::size_t row = (i / pairs * 2 + panel) * kPanelRows;
        for (std::size_t second = 0; second < 2; ++second) {
          const std::size_t digit_group = i % pairs * 2 + second;
          if (row >= product.rows || digit_group >= product.digit_groups) continue;
          add_sums(sums[i].tile[panel][second], product, digit_group, row, product.rows);
        }
      }
    }
  }
}

// Linux gives the tile registers to processes that ask for them.
bool runs_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kTile) == 0 || (edx & kInt8) == 0) return false;
  // ARCH_REQ_XCOMP_PERM, and the state component of tile data; headers may be older.
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace entrollm
