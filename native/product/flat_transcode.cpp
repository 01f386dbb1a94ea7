#include "product/flat_transcode.hpp"

#include <cstring>
#include <limits>
#include <new>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

// Of segments with more weights, one chunk in four is counted.
constexpr std::size_t kCountedWeights = 16384;

std::uint8_t* allocate(Arena& arena, std::size_t size) {
  std::uint8_t* piece = arena.allocate(size);
  if (piece == nullptr) throw std::bad_alloc();
  return piece;
}

template <class T>
const T* store(Arena& arena, const T* values, std::size_t count) {
  std::uint8_t* to = allocate(arena, count * sizeof(T));
  if (count != 0) std::memcpy(to, values, count * sizeof(T));
  return reinterpret_cast<const T*>(to);
}

}  // namespace

std::size_t most_flat_bytes(const Geometry& geometry, std::size_t segment_rows) {
  // Pieces are rounded up to cache lines: fields, where patches begin, and patches.
  constexpr std::size_t kRounding = 3 * 64;
  const std::size_t segments = (geometry.rows - 1) / segment_rows + 1;
  return geometry.rows * (geometry.padded_columns() + sizeof(std::uint32_t)) +
         segments * (sizeof(std::uint32_t) + kRounding);
}

std::uint8_t* Transcoder::reserve(std::size_t size) {
  if (symbols_.size() < size) symbols_.resize(size);
  return symbols_.data();
}

FlatWindow Transcoder::choose(std::size_t rows, std::size_t columns) const {
  // Patches of a segment are numbered in 32 bits, and a symbol has up to 32 of them.
  if (rows * columns > std::numeric_limits<std::uint32_t>::max() / 32) return kWholeWindow;
  std::uint64_t counts[256] = {};
  count_symbols(symbols_.data(), rows, columns, rows * columns > kCountedWeights ? 4 : 1, counts);
  return choose_flat_window(counts, FlatGoal::kSpeed);
}

FlatSegment Transcoder::transcode(std::size_t rows, std::size_t columns, Arena& arena) {
  const std::size_t chunks = (columns + kVector - 1) / kVector;
  const std::size_t padded = chunks * kVector;
  FlatWindow window = choose(rows, columns);
  find_patches(rows, columns, window);
  const std::size_t patches = patches_.size() * sizeof(FlatPatch);
  if (rows * flat_row_bytes(chunks, window.bits) + patches > rows * padded) {
    window = kWholeWindow;
    find_patches(rows, columns, window);
  }
  const std::size_t row_bytes = flat_row_bytes(chunks, window.bits);
  std::uint8_t* fields = allocate(arena, rows * row_bytes);
  kernels().flat->pack(symbols_.data(), rows * chunks, window.bits, window.base, fields);
  const std::uint32_t* first = store(arena, first_.data(), first_.size());
  const FlatPatch* words = store(arena, patches_.data(), patches_.size());
  return {rows, window.bits, window.base, fields, {first, words}};
}

void Transcoder::find_patches(std::size_t rows, std::size_t columns, const FlatWindow& window) {
  const std::size_t padded = (columns + kVector - 1) / kVector * kVector;
  first_.assign(1, 0);
  patches_.clear();
  for (std::size_t row = 0; row < rows; ++row) {
    std::uint8_t* symbols = symbols_.data() + row * padded;
    std::memset(symbols + columns, window.base, padded - columns);
    if (window.bits < kMaxFlatBits) append_patches(symbols, padded, window, patches_);
    first_.push_back(static_cast<std::uint32_t>(patches_.size()));
  }
}

FlatSegment copy_segment(const FlatSegment& segment, std::size_t row_bytes, Arena& arena) {
  FlatSegment copy = segment;
  const FlatPatches& patches = segment.patches;
  copy.fields = store(arena, segment.fields, segment.rows * row_bytes);
  // Behind fields, where kernels read a few bytes more, there is something always.
  copy.patches.first = store(arena, patches.first, segment.rows + 1);
  copy.patches.words = store(arena, patches.words, patches.first[segment.rows]);
  return copy;
}

Transcoder& thread_transcoder() {
  thread_local Transcoder transcoder;
  return transcoder;
}

}  // namespace entrollm
