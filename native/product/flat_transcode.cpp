#include "product/flat_transcode.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <new>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

// Cycles of a chunk by width, and of a patch, from the first-level cache; and cycles a byte of
// memory traffic where cores share it.
constexpr double kChunkCycles[kMaxFlatBits + 1] = {0, 0, 2.5, 4.0, 2.5, 3.8, 4.0, 5.9, 6.0};
constexpr double kPatchCycles = 1.2;
constexpr double kByteCycles = 0.4;

constexpr FlatWindow kWholeWindow{8, 0};  // has every symbol

constexpr std::size_t kNarrowColumns = 65536;  // those that 16 bits can number

// Of segments with more weights, one chunk in four is counted.
constexpr std::size_t kCountedWeights = 16384;

constexpr std::size_t patch_bytes(bool is_wide) {
  return sizeof(std::int16_t) + (is_wide ? sizeof(std::uint32_t) : sizeof(std::uint16_t));
}

std::uint8_t* allocate(Arena& arena, std::size_t size) {
  std::uint8_t* piece = arena.allocate(size);
  if (piece == nullptr) throw std::bad_alloc();
  return piece;
}

}  // namespace

FlatWindow choose_flat_window(const std::uint64_t (&counts)[256], bool is_wide) {
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
    const auto outside = total - static_cast<double>(before[base + size] - before[base]);
    const double bytes = total * bits / 8 + outside * static_cast<double>(patch_bytes(is_wide));
    const double cycles =
        total / static_cast<double>(kVector) * kChunkCycles[bits] + outside * kPatchCycles;
    const double cost = bytes * kByteCycles + cycles;
    if (cost < least) {
      least = cost;
      best = {bits, static_cast<std::uint8_t>(base)};
    }
  }
  return best;
}

std::size_t most_flat_bytes(const Geometry& geometry, std::size_t segment_rows) {
  // Pieces are rounded up to cache lines: fields, where patches begin, columns and differences.
  constexpr std::size_t kRounding = 4 * 64;
  const std::size_t segments = (geometry.rows - 1) / segment_rows + 1;
  return geometry.rows * (geometry.padded_columns() + sizeof(std::uint32_t)) +
         segments * (sizeof(std::uint32_t) + kRounding);
}

std::uint8_t* Transcoder::reserve(std::size_t size) {
  if (symbols_.size() < size) symbols_.resize(size);
  return symbols_.data();
}

FlatWindow Transcoder::choose(std::size_t rows, std::size_t columns) const {
  const std::size_t chunks = (columns + kVector - 1) / kVector;
  const std::size_t step = rows * columns > kCountedWeights ? 4 : 1;
  // Patches of a row are numbered in 32 bits.
  if (rows * columns > std::numeric_limits<std::uint32_t>::max()) return kWholeWindow;
  // Four tables, so that runs of one symbol do not wait for their own increments.
  std::uint32_t tables[4][256] = {};
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint8_t* symbols = symbols_.data() + row * chunks * kVector;
    for (std::size_t chunk = row % step; chunk < chunks; chunk += step) {
      const std::size_t end = std::min(columns, (chunk + 1) * kVector);
      std::size_t i = chunk * kVector;
      for (; i + 4 <= end; i += 4) {
        for (std::size_t k = 0; k < 4; ++k) ++tables[k][symbols[i + k]];
      }
      for (; i < end; ++i) ++tables[0][symbols[i]];
    }
  }
  std::uint64_t counts[256];
  for (std::size_t symbol = 0; symbol < 256; ++symbol) {
    counts[symbol] = 0;
    for (const auto& table : tables) counts[symbol] += table[symbol];
  }
  return choose_flat_window(counts, columns > kNarrowColumns);
}

FlatSegment Transcoder::transcode(std::size_t rows, std::size_t columns, Arena& arena) {
  const std::size_t chunks = (columns + kVector - 1) / kVector;
  const std::size_t padded = chunks * kVector;
  FlatWindow window = choose(rows, columns);
  find_patches(rows, columns, window);
  const std::size_t patches = columns_.size() * patch_bytes(columns > kNarrowColumns);
  if (rows * flat_row_bytes(chunks, window.bits) + patches > rows * padded) {
    window = kWholeWindow;
    find_patches(rows, columns, window);
  }
  const std::size_t row_bytes = flat_row_bytes(chunks, window.bits);
  std::uint8_t* fields = allocate(arena, rows * row_bytes);
  kernels().flat->pack(symbols_.data(), rows * chunks, window.bits, window.base, fields);
  return {rows, window.bits, window.base, fields, store_patches(columns, arena)};
}

void Transcoder::find_patches(std::size_t rows, std::size_t columns, const FlatWindow& window) {
  const std::size_t padded = (columns + kVector - 1) / kVector * kVector;
  first_.assign(1, 0);
  columns_.clear();
  differences_.clear();
  for (std::size_t row = 0; row < rows; ++row) {
    std::uint8_t* symbols = symbols_.data() + row * padded;
    std::memset(symbols + columns, window.base, padded - columns);
    if (window.bits < kMaxFlatBits) find_row_patches(symbols, padded, window);
    first_.push_back(static_cast<std::uint32_t>(columns_.size()));
  }
}

// Most chunks have at most a few symbols outside of the window.
void Transcoder::find_row_patches(const std::uint8_t* symbols, std::size_t padded,
                                  const FlatWindow& window) {
  const auto span = static_cast<std::uint8_t>(window.largest() - window.base);
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
        columns_.push_back(static_cast<std::uint32_t>(chunk + i));
        differences_.push_back(static_cast<std::int16_t>(
            symbol - (symbol < window.base ? window.base : window.largest())));
      }
    }
  }
}

FlatPatches Transcoder::store_patches(std::size_t columns, Arena& arena) const {
  const std::size_t count = columns_.size();
  const auto store = [&](const void* values, std::size_t size) {
    std::uint8_t* to = allocate(arena, size);
    if (size != 0) std::memcpy(to, values, size);
    return to;
  };
  FlatPatches patches{};
  patches.first = reinterpret_cast<const std::uint32_t*>(
      store(first_.data(), first_.size() * sizeof(std::uint32_t)));
  patches.differences = reinterpret_cast<const std::int16_t*>(
      store(differences_.data(), count * sizeof(std::int16_t)));
  if (columns > kNarrowColumns) {
    patches.wide_columns = reinterpret_cast<const std::uint32_t*>(
        store(columns_.data(), count * sizeof(std::uint32_t)));
    return patches;
  }
  const std::vector<std::uint16_t> narrow(columns_.begin(), columns_.end());
  patches.columns =
      reinterpret_cast<const std::uint16_t*>(store(narrow.data(), count * sizeof(std::uint16_t)));
  return patches;
}

Transcoder& thread_transcoder() {
  thread_local Transcoder transcoder;
  return transcoder;
}

}  // namespace entrollm
