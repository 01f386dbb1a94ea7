// Symbols become flat fields and patches: which fields cost least, and the patches of a row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format/flat_streams.hpp"

namespace entrollm {

inline constexpr FlatWindow kWholeWindow{8, 0};  // has every symbol

// What a window should cost little of: stored bytes, or memory traffic and cycles together.
enum class FlatGoal { kSize, kSpeed };

// The window that costs least for symbols that occur `counts[s]` times each. A symbol outside costs
// patches, and a window of 8 bits has none outside.
FlatWindow choose_flat_window(const std::uint64_t (&counts)[256], FlatGoal goal);

// Adds symbols to their counts: `columns` of each of `rows` rows of `padded` symbols, but of all
// chunks of a row only one in `step`.
void count_symbols(const std::uint8_t* symbols, std::size_t rows, std::size_t columns,
                   std::size_t step, std::uint64_t (&counts)[256]);

// Appends the patches of a row of whole chunks.
void append_patches(const std::uint8_t* symbols, std::size_t padded, const FlatWindow& window,
                    std::vector<FlatPatch>& patches);

struct EncodedFlat {
  std::vector<std::uint8_t> fields;
  std::vector<FlatPatch> patches;
  std::vector<std::uint16_t> row_sizes;  // bytes of each row's patches
  std::vector<std::uint16_t> windows;    // FlatWindow::word() of each segment
};

// Encodes `symbols`, row-major (rows, columns), in segments of `segment_rows` rows, with the given
// windows, or with the smallest ones if `windows` is empty. Throws std::invalid_argument if there
// are not as many windows as segments, one is out of range, or a row has more patches than can be
// stored.
EncodedFlat encode_flat(const std::uint8_t* symbols, std::size_t rows, std::size_t columns,
                        std::size_t segment_rows, std::span<const std::uint16_t> windows);

}  // namespace entrollm
