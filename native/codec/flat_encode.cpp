#include "codec/flat_encode.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

// Cycles of a chunk by width, and of a patch, from the first-level cache; and cycles a byte of
// memory traffic where cores share it.
constexpr double kChunkCycles[kMaxFlatBits + 1] = {0, 0, 2.5, 4.0, 2.5, 3.8, 4.0, 5.9, 6.0};
constexpr double kPatchCycles = 1.2;
constexpr double kByteCycles = 0.4;

constexpr std::size_t kMostRowBytes = std::numeric_limits<std::uint16_t>::max();

// Patches that a symbol outside of a window takes.
std::uint64_t patches_of(int symbol, const FlatWindow& window) {
  if (symbol < window.base) return static_cast<std::uint64_t>(window.base - symbol + 7) / 8;
  if (symbol > window.largest())
    return static_cast<std::uint64_t>(symbol - window.largest() + 6) / 7;
  return 0;
}

// One symbol's patches; `gap` is the way to its column.
void append_symbol(std::size_t gap, int difference, std::vector<FlatPatch>& patches) {
  for (; gap > kMostPatchGap; gap -= kMostPatchGap) patches.push_back(make_patch(kMostPatchGap, 0));
  for (; difference != 0; gap = 0) {
    const int part = std::clamp(difference, kLeastPatch, kMostPatch);
    patches.push_back(make_patch(gap, part));
    difference -= part;
  }
}

// A segment's symbols, in rows of whole chunks, as an encoder appends it.
class SegmentEncoder {
 public:
  SegmentEncoder(std::size_t rows, std::size_t columns)
      : columns_(columns),
        chunks_((columns + kVector - 1) / kVector),
        symbols_(rows * chunks_ * kVector) {}

  void load(const std::uint8_t* symbols, std::size_t rows) {
    rows_ = rows;
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(symbols_.data() + row * padded(), symbols + row * columns_, columns_);
    }
  }

  FlatWindow choose() const {
    std::uint64_t counts[256] = {};
    count_symbols(symbols_.data(), rows_, columns_, 1, counts);
    return choose_flat_window(counts, FlatGoal::kSize);
  }

  // Whether the patches of every row can be stored.
  bool append(const FlatWindow& window, EncodedFlat& out) {
    const std::size_t patches = out.patches.size(), sizes = out.row_sizes.size();
    for (std::size_t row = 0; row < rows_; ++row) {
      std::uint8_t* symbols = symbols_.data() + row * padded();
      std::memset(symbols + columns_, window.base, padded() - columns_);
      const std::size_t before = out.patches.size();
      if (window.bits < kMaxFlatBits) append_patches(symbols, padded(), window, out.patches);
      const std::size_t size = (out.patches.size() - before) * sizeof(FlatPatch);
      if (size > kMostRowBytes) {
        out.patches.resize(patches);
        out.row_sizes.resize(sizes);
        return false;
      }
      out.row_sizes.push_back(static_cast<std::uint16_t>(size));
    }
    const std::size_t fields = out.fields.size();
    out.fields.resize(fields + rows_ * flat_row_bytes(chunks_, window.bits));
    kernels().flat->pack(symbols_.data(), rows_ * chunks_, window.bits, window.base,
                         out.fields.data() + fields);
    out.windows.push_back(window.word());
    return true;
  }

 private:
  std::size_t padded() const { return chunks_ * kVector; }

  const std::size_t columns_;
  const std::size_t chunks_;
  std::size_t rows_ = 0;
  std::vector<std::uint8_t> symbols_;
};

}  // namespace

FlatWindow choose_flat_window(const std::uint64_t (&counts)[256], FlatGoal goal) {
  std::uint64_t before[257] = {};
  for (std::size_t symbol = 0; symbol < 256; ++symbol) {
    before[symbol + 1] = before[symbol] + counts[symbol];
  }
  const auto total = static_cast<double>(before[256]);
  FlatWindow best = kWholeWindow;
  double least = std::numeric_limits<double>::infinity();
  for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
    const std::size_t size = std::size_t{1} << bits;
    std::size_t base = 0;
    for (std::size_t i = 0; i + size <= 256; ++i) {
      if (before[i + size] - before[i] > before[base + size] - before[base]) base = i;
    }
    const FlatWindow window{bits, static_cast<std::uint8_t>(base)};
    std::uint64_t patches = 0;
    for (int symbol = 0; symbol < 256; ++symbol) {
      patches += counts[symbol] * patches_of(symbol, window);
    }
    const auto count = static_cast<double>(patches);
    double cost = total * bits / 8 + count * sizeof(FlatPatch);
    if (goal == FlatGoal::kSpeed) {
      cost = cost * kByteCycles + count * kPatchCycles +
             total / static_cast<double>(kVector) * kChunkCycles[bits];
    }
    if (cost < least) {
      least = cost;
      best = window;
    }
  }
  return best;
}

void count_symbols(const std::uint8_t* symbols, std::size_t rows, std::size_t columns,
                   std::size_t step, std::uint64_t (&counts)[256]) {
  const std::size_t chunks = (columns + kVector - 1) / kVector;
  // Four tables, so that runs of one symbol do not wait for their own increments.
  std::uint64_t tables[4][256] = {};
  for (std::size_t row = 0; row < rows; ++row, symbols += chunks * kVector) {
    for (std::size_t chunk = row % step; chunk < chunks; chunk += step) {
      const std::size_t end = std::min(columns, (chunk + 1) * kVector);
      std::size_t i = chunk * kVector;
      for (; i + 4 <= end; i += 4) {
        for (std::size_t k = 0; k < 4; ++k) ++tables[k][symbols[i + k]];
      }
      for (; i < end; ++i) ++tables[0][symbols[i]];
    }
  }
  for (std::size_t symbol = 0; symbol < 256; ++symbol) {
    for (const auto& table : tables) counts[symbol] += table[symbol];
  }
}

// Most chunks have at most a few symbols outside of the window.
void append_patches(const std::uint8_t* symbols, std::size_t padded, const FlatWindow& window,
                    std::vector<FlatPatch>& patches) {
  const auto span = static_cast<std::uint8_t>(window.largest() - window.base);
  std::size_t last = 0;
  for (std::size_t chunk = 0; chunk < padded; chunk += kVector) {
    alignas(kVector) std::uint8_t outside[kVector];
    std::uint8_t any = 0;
    for (std::size_t i = 0; i < kVector; ++i) {
      outside[i] = static_cast<std::uint8_t>(symbols[chunk + i] - window.base) > span ? 0xff : 0;
      any |= outside[i];
    }
    if (any == 0) continue;
    for (std::size_t begin = 0; begin < kVector; begin += 8) {
      std::uint64_t word;
      std::memcpy(&word, outside + begin, sizeof word);
      if (word == 0) continue;
      for (std::size_t i = begin; i < begin + 8; ++i) {
        if (outside[i] == 0) continue;
        const int symbol = symbols[chunk + i];
        const int nearest = symbol < window.base ? window.base : window.largest();
        append_symbol(chunk + i - last, symbol - nearest, patches);
        last = chunk + i;
      }
    }
  }
}

EncodedFlat encode_flat(const std::uint8_t* symbols, std::size_t rows, std::size_t columns,
                        std::size_t segment_rows, std::span<const std::uint16_t> windows) {
  const std::size_t segments = (rows + segment_rows - 1) / segment_rows;
  if (!windows.empty() && windows.size() != segments) {
    throw std::invalid_argument("there are " + std::to_string(windows.size()) +
                                " windows, expected " + std::to_string(segments));
  }
  EncodedFlat out;
  SegmentEncoder encoder(std::min(rows, segment_rows), columns);
  for (std::size_t segment = 0; segment < segments; ++segment) {
    const std::size_t first = segment * segment_rows;
    encoder.load(symbols + first * columns, std::min(segment_rows, rows - first));
    const FlatWindow window = windows.empty() ? encoder.choose() : FlatWindow::of(windows[segment]);
    if (!window.is_valid()) throw std::invalid_argument("a window is out of range");
    if (encoder.append(window, out)) continue;
    if (!windows.empty()) throw std::invalid_argument("a row has too many patches");
    encoder.append(kWholeWindow, out);
  }
  return out;
}

}  // namespace entrollm
