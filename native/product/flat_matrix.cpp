#include "product/flat_matrix.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "codec/decode.hpp"
#include "codec/trellis.hpp"
#include "product/flat_transcode.hpp"
#include "product/matrix_product.hpp"

namespace entrollm {
namespace {

// Weights of a segment, which is decoded as a whole before its width is chosen: they fit the
// second-level cache.
constexpr std::size_t kSegmentWeights = std::size_t{1} << 17;
constexpr std::size_t kMostSegmentRows = 64;

// Whole row groups, as many as weights and rows allow.
std::size_t rows_of_segments(const Geometry& geometry) {
  const std::size_t by_weights = kSegmentWeights / geometry.padded_columns();
  const std::size_t rows = std::min(by_weights, kMostSegmentRows);
  return std::max<std::size_t>(1, rows / geometry.block_rows) * geometry.block_rows;
}

// Flat matrices have no blocks: any block sizes that are allowed.
Geometry geometry_of(std::size_t rows, std::size_t columns) {
  const Geometry geometry{rows, columns, 1, kVector};
  geometry.validate();
  return geometry;
}

}  // namespace

FlatMatrix::FlatMatrix(ThreadPool& pool, const CodedMatrix& matrix)
    : geometry_(matrix.geometry()),
      scales_(matrix.scales()),
      segment_rows_(rows_of_segments(geometry_)) {
  const std::size_t padded = geometry_.padded_columns();
  transcode(pool, [&](std::size_t first, std::size_t rows, std::uint8_t* symbols) {
    DecodeScratch& scratch = thread_scratch(matrix.code_, matrix.max_block());
    const std::size_t end = (first + rows - 1) / geometry_.block_rows + 1;
    for (std::size_t group = first / geometry_.block_rows; group < end; ++group) {
      for (std::size_t part = 0; part < geometry_.parts(); ++part) {
        if (!matrix.decode_part(group, part, scratch)) {
          throw_corrupt(group * geometry_.parts() + part);
        }
        const std::size_t width = geometry_.columns_in(part);
        std::uint8_t* to = symbols + (group * geometry_.block_rows - first) * padded +
                           part * geometry_.block_columns;
        for (std::size_t row = 0; row < geometry_.rows_in(group); ++row) {
          std::memcpy(to + row * padded, scratch.block() + row * width, width);
        }
      }
    }
  });
}

FlatMatrix::FlatMatrix(ThreadPool& pool, const FlatMatrix& stored)
    : geometry_(stored.geometry_),
      scales_(stored.scales_),
      segment_rows_(stored.has_trellis_ ? rows_of_segments(geometry_) : stored.segment_rows_) {
  if (!stored.has_trellis_) {
    copy(pool, stored);
    return;
  }
  const std::size_t padded = geometry_.padded_columns();
  transcode(pool, [&](std::size_t first, std::size_t rows, std::uint8_t* symbols) {
    for (std::size_t row = 0; row < rows; ++row) {
      stored.unpack(first + row, 1, symbols + row * padded);
    }
  });
}

// Makes the segments of symbols that fill(first row, rows, symbols) writes, in rows of whole
// chunks; it is called by all threads.
template <class Fill>
void FlatMatrix::transcode(ThreadPool& pool, const Fill& fill) {
  arena_.emplace(most_flat_bytes(geometry_, segment_rows_));
  segments_.resize((geometry_.rows - 1) / segment_rows_ + 1);
  pool.run(segments_.size(), [&](std::size_t segment, std::size_t) {
    const std::size_t first = segment * segment_rows_;
    const std::size_t rows = std::min(segment_rows_, geometry_.rows - first);
    Transcoder& transcoder = thread_transcoder();
    fill(first, rows, transcoder.reserve(rows * geometry_.padded_columns()));
    segments_[segment] = transcoder.transcode(rows, geometry_.columns, *arena_);
  });
  settle(pool);
}

void FlatMatrix::copy(ThreadPool& pool, const FlatMatrix& stored) {
  constexpr std::size_t kRounding = 3 * 64;  // pieces begin cache lines
  segments_.resize(stored.segments_.size());
  std::size_t size = 0;
  for (const FlatSegment& segment : stored.segments_) {
    size += segment.rows * row_bytes(segment) + (segment.rows + 1) * sizeof(std::uint32_t) +
            segment.patches.first[segment.rows] * sizeof(FlatPatch) + kRounding;
  }
  arena_.emplace(size);
  pool.run(segments_.size(), [&](std::size_t i, std::size_t) {
    const FlatSegment& segment = stored.segments_[i];
    segments_[i] = copy_segment(segment, row_bytes(segment), *arena_);
  });
  settle(pool);
}

// Moves the segments to where they stay.
void FlatMatrix::settle(ThreadPool& pool) {
  const std::uint8_t* before = arena_->data();
  arena_->settle(pool);
  const auto moved = [&]<class T>(const T* p) {
    const std::uint8_t* to = arena_->data() + (reinterpret_cast<const std::uint8_t*>(p) - before);
    return reinterpret_cast<const T*>(to);
  };
  for (FlatSegment& segment : segments_) {
    segment.fields = moved(segment.fields);
    segment.patches = {moved(segment.patches.first), moved(segment.patches.words)};
  }
}

FlatMatrix::FlatMatrix(std::size_t rows, std::size_t columns, const FlatStreams& streams,
                       Scales scales, bool has_trellis)
    : geometry_(geometry_of(rows, columns)),
      scales_(scales),
      segment_rows_(streams.segment_rows),
      has_trellis_(has_trellis) {
  check_scales(scales, rows, columns);
  if (segment_rows_ == 0) throw std::invalid_argument("segments have no rows");
  const std::size_t count = (rows - 1) / segment_rows_ + 1;
  if (streams.windows.size() != count) {
    throw std::invalid_argument("there are " + std::to_string(streams.windows.size()) +
                                " segments, expected " + std::to_string(count));
  }
  const std::size_t sizes = streams.patches.size() > stored_bytes(0) ? rows : 0;
  if (streams.row_sizes.size() != sizes) {
    throw std::invalid_argument("there are " + std::to_string(streams.row_sizes.size()) +
                                " sizes of patches, expected " + std::to_string(sizes));
  }
  segments_.reserve(count);
  // At most 2^40 weights of 8 bits, and at most 2^16 bytes of patches a row: all fit 64 bits.
  std::size_t fields = 0, patches = 0;
  for (std::size_t segment = 0; segment < count; ++segment) {
    const FlatWindow window = FlatWindow::of(streams.windows[segment]);
    if (!window.is_valid()) {
      throw std::invalid_argument("segment " + std::to_string(segment) + " has fields of " +
                                  std::to_string(window.bits) + " bits from symbol " +
                                  std::to_string(window.base) + " on");
    }
    const std::size_t rows_here = std::min(segment_rows_, rows - segment * segment_rows_);
    segments_.push_back({rows_here, window.bits, window.base, nullptr, {}});
    fields += rows_here * flat_row_bytes(chunks(), window.bits);
  }
  for (const std::uint16_t size : streams.row_sizes) patches += size;
  check_stream(streams.fields, fields, "field");
  check_stream(streams.patches, patches, "patch");
  place(streams);
}

// Sets where the fields and patches of stored segments are, now that the streams have them all.
void FlatMatrix::place(const FlatStreams& streams) {
  const std::uint8_t* fields = streams.fields.data();
  // Python aligns the stream.
  const auto* words = reinterpret_cast<const FlatPatch*>(streams.patches.data());
  first_.resize(geometry_.rows + segments_.size());
  std::uint32_t* first = first_.data();
  const std::uint16_t* sizes = streams.row_sizes.empty() ? nullptr : streams.row_sizes.data();
  for (FlatSegment& segment : segments_) {
    segment.fields = fields;
    segment.patches = {first, words};
    fields += segment.rows * row_bytes(segment);
    std::size_t at = 0;
    for (std::size_t row = 0; row < segment.rows; ++row) {
      *first++ = static_cast<std::uint32_t>(at);
      if (sizes != nullptr) at += check_row(words + at, *sizes++);
    }
    if (at > std::numeric_limits<std::uint32_t>::max()) {
      throw std::invalid_argument("a segment has more than 2^32 patches");
    }
    *first++ = static_cast<std::uint32_t>(at);
    words += at;
  }
}

// The number of a row's patches.
std::size_t FlatMatrix::check_row(const FlatPatch* words, std::size_t size) const {
  const std::size_t count = size / sizeof(FlatPatch);
  if (size % sizeof(FlatPatch) != 0) {
    throw std::invalid_argument("a row has half a patch");
  }
  std::size_t column = 0;  // at most 2^15 patches of 2^12 columns
  for (std::size_t i = 0; i < count; ++i) column += patch_gap(words[i]);
  if (column >= geometry_.columns) {
    throw std::invalid_argument("a row of " + std::to_string(geometry_.columns) +
                                " columns has a patch in column " + std::to_string(column));
  }
  return count;
}

std::array<std::size_t, kMaxFlatBits + 1> FlatMatrix::rows_by_bits() const {
  std::array<std::size_t, kMaxFlatBits + 1> rows{};
  for (const FlatSegment& segment : segments_) {
    rows[static_cast<std::size_t>(segment.bits)] += segment.rows;
  }
  return rows;
}

std::size_t FlatMatrix::patches() const {
  std::size_t total = 0;
  for (const FlatSegment& segment : segments_) total += segment.patches.first[segment.rows];
  return total;
}

void FlatMatrix::unpack(std::size_t first, std::size_t count, std::uint8_t* out) const {
  const FlatSegment& segment = segments_[first / segment_rows_];
  const std::size_t row = first % segment_rows_;
  const std::size_t padded = geometry_.padded_columns();
  kernels().flat->unpack(segment.fields + row * row_bytes(segment), count * chunks(), segment.bits,
                         segment.base, out);
  const FlatPatches& patches = segment.patches;
  for (std::size_t i = 0; i < count; ++i, out += padded) {
    std::size_t column = 0;
    for (std::size_t at = patches.first[row + i]; at < patches.first[row + i + 1]; ++at) {
      column += patch_gap(patches.words[at]);
      out[column] = static_cast<std::uint8_t>(out[column] + patch_difference(patches.words[at]));
    }
    if (has_trellis_) {
      TrellisState state;
      make_half_steps(out, padded, state);
    }
  }
}

namespace {

// Calls body(row, buffer) for every row below `count`; the buffer has room for a row.
template <class Body>
void for_rows(ThreadPool& pool, std::size_t count, std::size_t padded, const Body& body) {
  constexpr std::size_t kRowsPerTask = 16;
  pool.run((count + kRowsPerTask - 1) / kRowsPerTask, [&](std::size_t task, std::size_t) {
    auto& buffer = thread_buffers().tile;
    buffer.resize(std::max(buffer.size(), padded));
    const std::size_t end = std::min(count, (task + 1) * kRowsPerTask);
    for (std::size_t row = task * kRowsPerTask; row < end; ++row) body(row, buffer.data());
  });
}

}  // namespace

void FlatMatrix::decode(ThreadPool& pool, std::size_t begin, std::size_t end,
                        std::uint8_t* out) const {
  if (begin > end || end > geometry_.rows) throw std::invalid_argument("rows out of range");
  for_rows(pool, end - begin, geometry_.padded_columns(),
           [&](std::size_t row, std::uint8_t* buffer) {
             unpack(begin + row, 1, buffer);
             std::memcpy(out + row * geometry_.columns, buffer, geometry_.columns);
           });
}

void FlatMatrix::dequantize(ThreadPool& pool, std::span<const std::int64_t> rows,
                            float* out) const {
  check_rows(geometry_, rows);
  for_rows(pool, rows.size(), geometry_.padded_columns(), [&](std::size_t i, std::uint8_t* buffer) {
    const auto row = static_cast<std::size_t>(rows[i]);
    unpack(row, 1, buffer);
    dequantize_row(scales_, row, {buffer, geometry_.columns}, out + i * geometry_.columns);
  });
}

}  // namespace entrollm
