// Products of lossless matrices. Some instruction sets decode cascades and multiply in one pass.
// Other symbols are decoded into the first-level cache and multiplied from there: row blocks of
// codes, and pieces of flat rows. For many vectors, panels of rows become floats first.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels/kernels.hpp"
#include "product/activations.hpp"
#include "product/lossless.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kTasksPerThread = 8;
// Activation vectors whose sums are finished together.
constexpr std::size_t kVectorsAtOnce = 8;
// Columns that fused products take in one stride, and rows whose lanes stay in the first-level
// cache.
constexpr std::size_t kEight = 8 * kVector;
constexpr std::size_t kFusedRows = 64;
// Chunks of flat rows that are unpacked at a time, and how far ahead their fields are fetched.
constexpr std::size_t kPieceChunks = 32;
constexpr std::size_t kFieldsAheadBytes = 4096;
// Rows of a panel, and chunks and vectors that are multiplied at a time: four rows and four vectors
// of so many chunks fit the first-level cache, and panel and lanes the second.
constexpr std::size_t kPanelRows = 16;
constexpr std::size_t kPanelChunks = 16;
constexpr std::size_t kPanelVectors = 32;
// Floats between rows of panels and of activations, so that not all of them fall into the same sets
// of a cache.
constexpr std::size_t kRowGap = 16;

std::size_t x_stride_of(std::size_t padded) { return padded + kRowGap; }

// The rows of x, padded with zeros, each chunk in the order of the runs.
AlignedArray<float> in_order_of_runs(WordFormat format, const float* x, std::size_t batch,
                                     std::size_t columns, std::size_t padded) {
  // Fused products take 1, 2 or 4 vectors.
  const std::size_t room = batch <= kMostFusedLossless ? std::bit_ceil(batch) : batch;
  const std::size_t stride = x_stride_of(padded);
  AlignedArray<float> ordered(room * stride);
  std::fill(ordered.data() + batch * stride, ordered.data() + room * stride, 0.0f);
  for (std::size_t b = 0; b < batch; ++b) {
    const float* from = x + b * columns;
    float* to = ordered.data() + b * stride;
    for (std::size_t chunk = 0; chunk < padded; chunk += kVector) {
      float last[kVector] = {};
      const std::size_t count = std::min(kVector, columns - chunk);
      if (count < kVector) std::memcpy(last, from + chunk, count * sizeof(float));
      const float* source = count < kVector ? last : from + chunk;
      for (std::size_t i = 0; i < kVector; ++i) {
        to[chunk + i] = source[lossless_column(format, i / kLosslessRun, i % kLosslessRun)];
      }
    }
  }
  return ordered;
}

// Unpacks a row of a flat matrix from left to right.
class FlatRow {
 public:
  FlatRow(const FlatMatrix& matrix, std::size_t row) {
    const FlatSegment& segment = matrix.segments()[row / matrix.segment_rows()];
    const std::size_t index = row % matrix.segment_rows();
    bits_ = segment.bits;
    base_ = segment.base;
    fields_ = segment.fields + index * flat_row_bytes(matrix.chunks(), bits_);
    patch_ = segment.patches.words + segment.patches.first[index];
    last_patch_ = segment.patches.words + segment.patches.first[index + 1];
    if (patch_ != last_patch_) patch_column_ = patch_gap(*patch_);
  }

  // Writes the symbols of the next chunks.
  void unpack(std::size_t chunks, std::uint8_t* symbols) {
    const std::size_t bytes = chunks * flat_chunk_bytes(bits_);
    constexpr std::size_t kLine = 64;
    for (std::size_t at = 0; at < bytes; at += kLine) {
      __builtin_prefetch(fields_ + kFieldsAheadBytes + at, 0, 2);
    }
    kernels().flat->unpack(fields_, chunks, bits_, base_, symbols);
    fields_ += bytes;
    const std::size_t columns = chunks * kVector;
    for (; patch_ != last_patch_ && patch_column_ < columns; ++patch_) {
      std::uint8_t& symbol = symbols[patch_column_];
      symbol = static_cast<std::uint8_t>(symbol + patch_difference(*patch_));
      if (patch_ + 1 != last_patch_) patch_column_ += patch_gap(patch_[1]);
    }
    patch_column_ -= columns;
  }

 private:
  int bits_;
  std::uint8_t base_;
  const std::uint8_t* fields_;
  const FlatPatch* patch_;
  const FlatPatch* last_patch_;
  std::size_t patch_column_ = 0;  // from the next chunk on
};

// A thread's buffers, kept between products.
struct Buffers {
  AlignedArray<float> panel{0};         // kPanelRows rows, as far apart as vectors
  std::vector<float> lanes;             // of the rows of a fused product
  std::vector<std::uint8_t> symbols;    // (rows of a row block, padded columns)
  std::vector<std::uint8_t> wide_high;  // of a row of words of 8 bits, like wide_low
  std::vector<std::uint8_t> wide_low;
};

Buffers& buffers() {
  thread_local Buffers found;
  return found;
}

// One matrix times the activations.
class LosslessProduct {
 public:
  LosslessProduct(const LosslessMatrix& matrix, const float* x, std::size_t batch, float* y,
                  std::size_t stride)
      : matrix_(matrix),
        geometry_(matrix.geometry()),
        x_(x),
        x_stride_(x_stride_of(matrix.geometry().padded_columns())),
        batch_(batch),
        y_(y),
        stride_(stride),
        add_(matrix.format() == WordFormat::kHalf ? kernels().lossless->add_half
                                                  : kernels().lossless->add_bfloat16),
        expand_(matrix.format() == WordFormat::kHalf ? kernels().lossless->expand_half
                                                     : kernels().lossless->expand_bfloat16),
        run_(choose_run()) {}

  std::size_t units() const { return geometry_.row_blocks(); }

  // Multiplies row blocks [begin, end). Returns a block that does not decode, or SIZE_MAX.
  std::size_t run(std::size_t begin, std::size_t end) const { return (this->*run_)(begin, end); }

 private:
  using Run = std::size_t (LosslessProduct::*)(std::size_t begin, std::size_t end) const;

  Run choose_run() const {
    if (batch_ > kVectorsAtOnce) return &LosslessProduct::run_panels;
    if (can_fuse()) return &LosslessProduct::run_fused;
    const bool is_flat = matrix_.flat() != nullptr && has_low_bytes(matrix_.type());
    return is_flat ? &LosslessProduct::run_flat : &LosslessProduct::run_blocks;
  }

  bool can_fuse() const {
    const CodedMatrix* coded = matrix_.coded();
    return coded != nullptr && kernels().lossless->cascade_bfloat16 != nullptr &&
           coded->has_cascade() && coded->cascade().low_bits == 0 &&
           coded->cascade().bits[0] <= kMostFusedRootBits &&
           matrix_.type() == FloatType::kBfloat16 && batch_ <= kMostFusedLossless &&
           geometry_.columns % kEight == 0 &&
           (geometry_.parts() == 1 || geometry_.block_columns % kEight == 0);
  }

  std::size_t run_fused(std::size_t begin, std::size_t end) const {
    std::vector<float>& lanes = buffers().lanes;
    const std::size_t vectors = std::bit_ceil(batch_);
    const std::size_t step = std::max<std::size_t>(1, kFusedRows / geometry_.block_rows);
    for (std::size_t from = begin; from < end; from += step) {
      const std::size_t to = std::min(end, from + step);
      const std::size_t first_row = from * geometry_.block_rows;
      const std::size_t rows = geometry_.rows_between(from, to);
      lanes.resize(rows * vectors * kLosslessLanes);
      const CascadeRun run = matrix_.coded()->cascade_run(from, to);
      const std::size_t done = kernels().lossless->cascade_bfloat16(
          run, {matrix_.low(first_row), x_, x_stride_, geometry_.columns, vectors, lanes.data()});
      if (done != run.row_blocks * run.parts) return from * run.parts + done;
      store_sums(first_row, rows, 0, {lanes.data(), vectors, batch_});
    }
    return SIZE_MAX;
  }

  // The bytes of some columns of a row. The last chunk has zeros past the last column: any other
  // weights might not be finite.
  struct Bytes {
    const std::uint8_t* high;
    const std::uint8_t* low;
    std::size_t whole;  // chunks that lie in the row
    bool has_last;
    std::uint8_t last_high[kVector];
    std::uint8_t last_low[kVector];

    Bytes(const std::uint8_t* high_bytes, const std::uint8_t* low_bytes, std::size_t columns)
        : high(high_bytes),
          low(low_bytes),
          whole(columns / kVector),
          has_last(columns % kVector != 0) {
      if (!has_last) return;
      const std::size_t done = whole * kVector;
      for (std::uint8_t* last : {last_high, last_low}) std::memset(last, 0, kVector);
      std::memcpy(last_high, high + done, columns - done);
      std::memcpy(last_low, low + done, columns - done);
    }
  };

  // Calls take(row, high, low) for all rows of row blocks [begin, end).
  template <class Take>
  std::size_t for_rows(std::size_t begin, std::size_t end, const Take& take) const {
    const std::size_t width = geometry_.padded_columns();
    Buffers& own = buffers();
    if (own.symbols.size() < geometry_.block_rows * width) {
      own.symbols.resize(geometry_.block_rows * width);
    }
    const bool has_low = has_low_bytes(matrix_.type());
    if (!has_low) {
      own.wide_high.resize(width);
      own.wide_low.resize(width);
    }
    for (std::size_t row_block = begin; row_block < end; ++row_block) {
      const std::size_t bad = matrix_.decode_rows(row_block, own.symbols.data());
      if (bad != SIZE_MAX) return bad;
      for (std::size_t i = 0; i < geometry_.rows_in(row_block); ++i) {
        const std::size_t row = row_block * geometry_.block_rows + i;
        const std::uint8_t* symbols = own.symbols.data() + i * width;
        if (has_low) {
          take(row, symbols, matrix_.low(row));
        } else {
          matrix_.widen(symbols, geometry_.columns, own.wide_high.data(), own.wide_low.data());
          take(row, own.wide_high.data(), own.wide_low.data());
        }
      }
    }
    return SIZE_MAX;
  }

  std::size_t run_blocks(std::size_t begin, std::size_t end) const {
    return for_rows(begin, end,
                    [&](std::size_t row, const std::uint8_t* high, const std::uint8_t* low) {
                      alignas(64) float lanes[kVectorsAtOnce * kLosslessLanes];
                      std::fill_n(lanes, batch_ * kLosslessLanes, 0.0f);
                      add_piece(Bytes(high, low, geometry_.columns), 0, lanes);
                      store_sums(row, 1, 0, {lanes, batch_, batch_});
                    });
  }

  std::size_t run_flat(std::size_t begin, std::size_t end) const {
    const FlatMatrix& flat = *matrix_.flat();
    const std::size_t last = std::min(geometry_.rows, end * geometry_.block_rows);
    for (std::size_t row = begin * geometry_.block_rows; row < last; ++row) {
      FlatRow pieces(flat, row);
      alignas(64) float lanes[kVectorsAtOnce * kLosslessLanes];
      std::fill_n(lanes, batch_ * kLosslessLanes, 0.0f);
      for (std::size_t column = 0; column < geometry_.columns; column += kPieceChunks * kVector) {
        alignas(64) std::uint8_t symbols[kPieceChunks * kVector];
        const std::size_t columns = std::min(kPieceChunks * kVector, geometry_.columns - column);
        pieces.unpack((columns - 1) / kVector + 1, symbols);
        add_piece(Bytes(symbols, matrix_.low(row) + column, columns), column, lanes);
      }
      store_sums(row, 1, 0, {lanes, batch_, batch_});
    }
    return SIZE_MAX;
  }

  // Adds the products of bytes from `column` on, which begins a chunk.
  void add_piece(const Bytes& bytes, std::size_t column, float* lanes) const {
    const float* x = x_ + column;
    if (bytes.whole != 0) add_({bytes.high, bytes.low, bytes.whole, x, x_stride_, batch_, lanes});
    if (bytes.has_last) {
      x += bytes.whole * kVector;
      add_({bytes.last_high, bytes.last_low, 1, x, x_stride_, batch_, lanes});
    }
  }

  // (rows, stride, kLosslessLanes), of which the first `vectors` of each row are sums.
  struct Lanes {
    const float* lanes;
    std::size_t stride;
    std::size_t vectors;
  };

  void store_sums(std::size_t first_row, std::size_t rows, std::size_t first_vector,
                  const Lanes& sums) const {
    float found[kPanelVectors];
    for (std::size_t row = 0; row < rows; ++row) {
      const float* lanes = sums.lanes + row * sums.stride * kLosslessLanes;
      kernels().lossless->sum_lanes(lanes, sums.vectors, found);
      float* to = y_ + first_vector * stride_ + first_row + row;
      for (std::size_t v = 0; v < sums.vectors; ++v) to[v * stride_] = found[v];
    }
  }

  std::size_t run_panels(std::size_t begin, std::size_t end) const {
    Buffers& own = buffers();
    if (own.panel.size() < kPanelRows * x_stride_) {
      own.panel = AlignedArray<float>(kPanelRows * x_stride_);
    }
    std::size_t first = begin * geometry_.block_rows, rows = 0;
    const auto add_row = [&](std::size_t, const std::uint8_t* high, const std::uint8_t* low) {
      const Bytes bytes(high, low, geometry_.columns);
      float* to = own.panel.data() + rows * x_stride_;
      expand_(high, low, bytes.whole, to);
      if (bytes.has_last) {
        expand_(bytes.last_high, bytes.last_low, 1, to + bytes.whole * kVector);
      }
      if (++rows == kPanelRows) {
        multiply_panel(first, rows);
        first += rows;
        rows = 0;
      }
    };
    const std::size_t bad = for_rows(begin, end, add_row);
    if (bad == SIZE_MAX) multiply_panel(first, rows);
    return bad;
  }

  void multiply_panel(std::size_t first_row, std::size_t rows) const {
    const std::size_t width = geometry_.padded_columns();
    const float* panel = buffers().panel.data();
    std::vector<float>& lanes = buffers().lanes;
    for (std::size_t first = 0; first < batch_; first += kPanelVectors) {
      const std::size_t vectors = std::min(kPanelVectors, batch_ - first);
      lanes.assign(rows * vectors * kLosslessLanes, 0.0f);
      for (std::size_t at = 0; at < width; at += kPanelChunks * kVector) {
        const std::size_t chunks = std::min(kPanelChunks, (width - at) / kVector);
        kernels().lossless->add_panel({panel + at, x_stride_, rows, x_ + first * x_stride_ + at,
                                       x_stride_, vectors, chunks, lanes.data()});
      }
      store_sums(first_row, rows, first, {lanes.data(), vectors, vectors});
    }
  }

  const LosslessMatrix& matrix_;
  const Geometry& geometry_;
  const float* x_;
  std::size_t x_stride_;
  std::size_t batch_;
  float* y_;
  std::size_t stride_;
  void (*add_)(const LosslessRow& row);
  void (*expand_)(const std::uint8_t* high, const std::uint8_t* low, std::size_t chunks,
                  float* weights);
  Run run_;
};

}  // namespace

void multiply_lossless(ThreadPool& pool, std::span<const LosslessMatrix* const> matrices,
                       const float* x, std::size_t batch, float* y) {
  if (matrices.empty() || batch == 0) return;
  const Geometry& geometry = matrices.front()->geometry();
  std::size_t outputs = 0;
  bool has_format[2] = {};
  for (const LosslessMatrix* matrix : matrices) {
    if (matrix->geometry().columns != geometry.columns) {
      throw std::invalid_argument("matrices must have the same number of columns");
    }
    outputs += matrix->geometry().rows;
    has_format[static_cast<int>(matrix->format())] = true;
  }
  std::vector<AlignedArray<float>> ordered;
  for (const WordFormat format : {WordFormat::kBfloat16, WordFormat::kHalf}) {
    const std::size_t rows = has_format[static_cast<int>(format)] ? batch : 0;
    ordered.push_back(
        in_order_of_runs(format, x, rows, geometry.columns, geometry.padded_columns()));
  }
  std::vector<LosslessProduct> products;
  struct Task {
    std::size_t product;
    std::size_t begin;
    std::size_t end;
  };
  std::vector<Task> tasks;
  const std::size_t wanted = pool.size() == 1 ? 1 : pool.size() * kTasksPerThread;
  std::size_t first_output = 0;
  for (const LosslessMatrix* matrix : matrices) {
    products.emplace_back(*matrix, ordered[static_cast<std::size_t>(matrix->format())].data(),
                          batch, y + first_output, outputs);
    first_output += matrix->geometry().rows;
    const std::size_t units = products.back().units();
    const std::size_t count = std::min(units, (wanted - 1) / matrices.size() + 1);
    for (std::size_t i = 0; i < count; ++i) {
      tasks.push_back({products.size() - 1, units * i / count, units * (i + 1) / count});
    }
  }
  std::atomic<std::size_t> corrupt{SIZE_MAX};
  pool.run(tasks.size(), [&](std::size_t task, std::size_t) {
    const Task& work = tasks[task];
    const std::size_t bad = products[work.product].run(work.begin, work.end);
    if (bad != SIZE_MAX) corrupt = bad;
  });
  if (corrupt != SIZE_MAX) throw_corrupt(corrupt);
}

}  // namespace entrollm
