#include "product/grouped.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "codec/decode.hpp"
#include "format/flat.hpp"
#include "product/activations.hpp"
#include "product/grouped_by_segments.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kTasksPerThread = 8;

// Least units of a task: fields are fetched some kilobytes ahead, which in a shorter task are those
// of another one.
constexpr std::size_t kTaskUnits = 8;
constexpr std::size_t kFlattenRows = 16;

// Rows whose scales are expanded together, and whose fields stay in the second-level cache while
// the vectors of a batch pass.
constexpr std::size_t kTileRows = 16;

constexpr std::size_t kNoBlock = SIZE_MAX;

std::size_t group_count(const Geometry& geometry, std::size_t size) {
  return (geometry.columns - 1) / size + 1;
}

// The symbols that a code can have, in order.
std::vector<std::uint8_t> symbols_of(const Code& code) {
  std::array<bool, 256> found{};
  for (const Node& node : code.nodes()) {
    if (node.kind == NodeKind::kSplit) continue;
    if (node.bits == 8) {
      found.fill(true);
      break;
    }
    const std::size_t count = (std::size_t{1} << node.bits) - (node.left >= 0 ? 1 : 0);
    for (std::size_t i = 0; i < count; ++i) {
      for (unsigned low = 0; low < 1u << code.low_bits(); ++low) found[node.table[i] | low] = true;
    }
  }
  std::vector<std::uint8_t> symbols;
  for (std::size_t symbol = 0; symbol < found.size(); ++symbol) {
    if (found[symbol]) symbols.push_back(static_cast<std::uint8_t>(symbol));
  }
  return symbols;
}

int width_of(std::size_t largest, int least) {
  return std::max(least, static_cast<int>(std::bit_width(largest)));
}

// Kernels look symbols up by fields of 3 or 4 bits.
constexpr int kLeastTableBits = 3;
static_assert(kGroupedTable == 16);

}  // namespace

GroupedMatrix::GroupedMatrix(const CodedMatrix& coded, const GroupScales& scales)
    : coded_(coded), scales_(scales) {
  if (scales.size == 0) throw std::invalid_argument("groups must have columns");
  if (scales.terms.groups != group_count(coded.geometry(), scales.size)) {
    throw std::invalid_argument("there must be a scale for each row and group");
  }
  if (!scales.values.empty() && scales.values.size() != 256) {
    throw std::invalid_argument("there must be a value for each symbol");
  }
}

void GroupedMatrix::flatten(ThreadPool& pool) {
  if (!can_flatten() || is_flat()) return;
  const Geometry& geometry = coded_.geometry();
  const std::vector<std::uint8_t> symbols = symbols_of(coded_.code());
  symbol_bits_ = width_of(symbols.back(), kMinFlatBits);
  const int numbered = width_of(symbols.size() - 1, kLeastTableBits);
  has_table_ = symbols.size() <= kGroupedTable && numbered < symbol_bits_;
  const int bits = has_table_ ? numbered : symbol_bits_;
  std::array<std::uint8_t, 256> numbers{};
  for (std::size_t i = 0; has_table_ && i < symbols.size(); ++i) {
    table_[i] = symbols[i];
    numbers[symbols[i]] = static_cast<std::uint8_t>(i);
  }
  const std::size_t chunks = geometry.padded_columns() / kVector;
  row_bytes_ = flat_row_bytes(chunks, bits);
  Arena arena(geometry.rows * row_bytes_ + kVector);
  std::uint8_t* fields = arena.allocate(geometry.rows * row_bytes_);
  if (fields == nullptr) throw std::bad_alloc();
  const std::size_t step = std::max<std::size_t>(1, kFlattenRows / geometry.block_rows);
  std::atomic<std::size_t> corrupt{kNoBlock};
  pool.run((geometry.row_blocks() - 1) / step + 1, [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * step;
    const std::size_t end = std::min(geometry.row_blocks(), begin + step);
    const std::size_t bad = coded_.for_blocks(begin, end, [&](const DecodedBlock& block) {
      std::array<std::uint8_t, kMaxBlockColumns> numbered_row;
      for (std::size_t row = 0; row < block.rows; ++row) {
        const std::uint8_t* from = block.symbols + row * block.columns;
        if (has_table_) {
          for (std::size_t i = 0; i < block.columns; ++i) numbered_row[i] = numbers[from[i]];
          from = numbered_row.data();
        }
        kernels().flat->pack(from, block.columns / kVector, bits, 0,
                             fields + (block.first_row + row) * row_bytes_ +
                                 flat_row_bytes(block.first_column / kVector, bits));
      }
    });
    if (bad != kNoBlock) corrupt = bad;
  });
  if (corrupt != kNoBlock) throw_corrupt(corrupt);
  arena.settle(pool);
  fields_begin_ = arena.data();
  fields_.emplace(std::move(arena));
  bits_ = bits;
}

namespace {

// The vectors of a batch, rounded, in groups of up to kMostFlatVectors side by side, and the sums
// of each over groups of columns.
class GroupedVectors {
 public:
  GroupedVectors(ThreadPool& pool, const Activations& x, std::size_t padded, std::size_t size,
                 std::size_t columns)
      : x_(x),
        padded_(padded),
        stride_(((columns - 1) / size + kGroupedLanes) / kGroupedLanes * kGroupedLanes),
        digits_(2 * padded * lane_vectors()),
        sums_(stride_ * lane_vectors()) {
    const std::size_t passes = (x.batch() - 1) / kMostFlatVectors + 1;
    pool.run(passes, [&](std::size_t pass, std::size_t) {
      const std::size_t first = pass * kMostFlatVectors;
      interleave(first);
      const std::size_t end = std::min(x.batch(), first + kMostFlatVectors);
      for (std::size_t b = first; b < end; ++b) add_up(b, size, columns);
    });
  }

  std::size_t batch() const { return x_.batch(); }
  // Vectors from `first` on, a multiple of kMostFlatVectors, that are multiplied together, and how
  // many places there are for them.
  std::size_t together(std::size_t first) const {
    return std::min(kMostFlatVectors, batch() - first);
  }
  std::size_t places(std::size_t first) const { return std::bit_ceil(together(first)); }
  // Places of all vectors.
  std::size_t lane_vectors() const {
    const std::size_t last = (batch() - 1) / kMostFlatVectors * kMostFlatVectors;
    return last + places(last);
  }
  const double* scales(std::size_t b) const { return x_.scales() + b; }
  // Groups of a row, rounded up to whole lanes of zeros.
  std::size_t stride() const { return stride_; }
  const float* sums(std::size_t b) const { return sums_.data() + b * stride_; }

  // The vectors from `first` on, from a chunk on.
  FlatVectors from(std::size_t first, std::size_t chunk) const {
    const std::size_t count = places(first);
    return {digits_.data() + 2 * (first * padded_ + chunk * count * kVector), count};
  }

 private:
  void interleave(std::size_t first) {
    const std::size_t count = places(first), chunks = padded_ / kVector;
    std::int8_t* const begin = digits_.data() + 2 * first * padded_;
    std::int8_t* out = begin;
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
      for (std::size_t i = 0; i < count; ++i, out += 2 * kVector) {
        if (i < together(first)) {
          const Digits x = x_.digits(first + i, chunk * kVector);
          std::memcpy(out, x.high, kVector);
          std::memcpy(out + kVector, x.low, kVector);
        } else {
          std::memset(out, 0, 2 * kVector);
        }
      }
    }
    const ReorderDigits reorder = kernels().grouped->reorder;
    if (reorder != nullptr) reorder(begin, chunks, count);
  }

  // The sums of a vector over groups.
  void add_up(std::size_t b, std::size_t size, std::size_t columns) {
    const std::int16_t* whole = x_.digits(b, 0).whole;
    float* out = sums_.data() + b * stride_;
    for (std::size_t begin = 0; begin < columns; begin += size) {
      const std::size_t end = std::min(columns, begin + size);
      std::int64_t sum = 0;
      for (std::size_t at = begin; at < end; at += kVector) {
        const std::size_t stop = std::min(end, at + kVector);
        std::int32_t part = 0;
        for (std::size_t j = at; j < stop; ++j) part += whole[j];
        sum += part;
      }
      *out++ = static_cast<float>(sum);
    }
  }

  const Activations& x_;
  std::size_t padded_;
  std::size_t stride_;
  AlignedArray<std::int8_t> digits_;  // (passes, chunks, places, 2 * kVector)
  std::vector<float> sums_;           // (places, stride)
};

// A thread's buffers, kept between products.
struct Scratch {
  std::vector<float> scale, shift, spare, lanes;
};

// One matrix times the vectors, whose outputs are `stride` floats apart.
class GroupedProduct {
 public:
  GroupedProduct(const GroupedMatrix& matrix, const GroupedVectors& x, float* y, std::size_t stride)
      : matrix_(matrix), geometry_(matrix.geometry()), x_(x), y_(y), stride_(stride) {}

  // Runs of rows that tasks consist of.
  std::size_t units() const {
    return matrix_.is_flat() ? (geometry_.rows - 1) / kTileRows + 1 : geometry_.row_blocks();
  }

  // Multiplies units [begin, end). Returns a block that does not decode, or kNoBlock.
  std::size_t run(std::size_t begin, std::size_t end) const {
    if (matrix_.is_flat()) {
      for (std::size_t unit = begin; unit < end; ++unit) multiply_flat_rows(unit * kTileRows);
      return kNoBlock;
    }
    std::size_t last_row = SIZE_MAX;
    return matrix_.coded().for_blocks(begin, end, [&](const DecodedBlock& block) {
      if (block.first_row != last_row) start_rows(block.first_row, block.rows);
      last_row = block.first_row;
      const GroupedRows rows = rows_of(block.symbols, block.columns, block.first_column / kVector,
                                       block.columns / kVector, 8, block.rows);
      for_passes([&](std::size_t first) {
        float* lanes = scratch().lanes.data() + first * rows.rows * kGroupedLanes;
        kernels().grouped->product(rows, x_.from(first, rows.first_chunk), lanes);
      });
      if (block.first_column + block.columns >= geometry_.columns) {
        for_passes([&](std::size_t first) {
          finish_rows(block.first_row, block.rows, first,
                      scratch().lanes.data() + first * block.rows * kGroupedLanes);
        });
      }
    });
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch buffers;
    return buffers;
  }

  // Calls body(first) for the first one of the vectors that are multiplied together.
  template <class Body>
  void for_passes(const Body& body) const {
    for (std::size_t first = 0; first < x_.batch(); first += kMostFlatVectors) body(first);
  }

  // One pass after the other, whose lanes stay in the first-level cache.
  void multiply_flat_rows(std::size_t first_row) const {
    const std::size_t count = std::min(kTileRows, geometry_.rows - first_row);
    expand_terms(first_row, count);
    const GroupedRows rows =
        rows_of(matrix_.fields() + first_row * matrix_.row_bytes(), matrix_.row_bytes(), 0,
                geometry_.padded_columns() / kVector, matrix_.bits(), count);
    std::vector<float>& lanes = scratch().lanes;
    lanes.resize(count * kMostFlatVectors * kGroupedLanes);
    for_passes([&](std::size_t first) {
      kernels().grouped->begin(shifts_of(first), count, x_.places(first), lanes.data());
      kernels().grouped->product(rows, x_.from(first, 0), lanes.data());
      finish_rows(first_row, count, first, lanes.data());
    });
  }

  GroupedRows rows_of(const std::uint8_t* fields, std::size_t row_bytes, std::size_t first_chunk,
                      std::size_t chunks, int bits, std::size_t count) const {
    return {fields,
            count,
            row_bytes,
            first_chunk,
            chunks,
            bits,
            matrix_.is_flat() ? matrix_.table() : nullptr,
            matrix_.is_flat() ? matrix_.symbol_bits() : bits,
            matrix_.scales().size,
            scratch().scale.data(),
            matrix_.scales().terms.groups};
  }

  // Lanes of coded rows are (passes, rows, places of a pass, kGroupedLanes): their blocks come one
  // after the other.
  void start_rows(std::size_t first_row, std::size_t count) const {
    expand_terms(first_row, count);
    std::vector<float>& lanes = scratch().lanes;
    lanes.resize(count * x_.lane_vectors() * kGroupedLanes);
    for_passes([&](std::size_t first) {
      kernels().grouped->begin(shifts_of(first), count, x_.places(first),
                               lanes.data() + first * count * kGroupedLanes);
    });
  }

  // Expands the scales of some rows. Kernels read whole registers, so that zeros follow the last
  // row's.
  void expand_terms(std::size_t first, std::size_t count) const {
    Scratch& buffers = scratch();
    const GroupTerms& terms = matrix_.scales().terms;
    const std::size_t size = count * terms.groups;
    for (std::vector<float>* buffer : {&buffers.scale, &buffers.shift, &buffers.spare}) {
      buffer->resize(size + kVector);
      std::fill(buffer->begin() + static_cast<std::ptrdiff_t>(size), buffer->end(), 0.0f);
    }
    kernels().grouped->terms(terms, first, count, buffers.scale.data(), buffers.shift.data(),
                             buffers.spare.data());
    if (first + 3 * count <= geometry_.rows) fetch_terms(terms, first + 2 * count, count);
  }

  // Fetches the stored scales of later rows, which come in pieces too short for the processor to
  // foresee.
  static void fetch_terms(const GroupTerms& terms, std::size_t first, std::size_t count) {
    constexpr std::size_t kLine = 64;
    for (const GroupArray* array : {&terms.scale, &terms.zero, &terms.minimum}) {
      if (array->values == nullptr) continue;
      const std::size_t row = terms.groups * element_bytes(array->type);
      const auto* values = static_cast<const std::uint8_t*>(array->values) + first * row;
      for (std::size_t at = 0; at < count * row; at += kLine) __builtin_prefetch(values + at, 0, 2);
    }
  }

  GroupedShifts shifts_of(std::size_t first) const {
    const GroupTerms& terms = matrix_.scales().terms;
    return {terms.has_shift() ? scratch().shift.data() : nullptr, terms.groups, x_.sums(first),
            x_.stride()};
  }

  void finish_rows(std::size_t first_row, std::size_t count, std::size_t first,
                   const float* lanes) const {
    kernels().grouped->totals(lanes, {count, x_.places(first), x_.together(first), x_.scales(first),
                                      y_ + first * stride_ + first_row, stride_});
  }

  const GroupedMatrix& matrix_;
  const Geometry& geometry_;
  const GroupedVectors& x_;
  float* y_;
  std::size_t stride_;
};

}  // namespace

void multiply_grouped(ThreadPool& pool, std::span<const GroupedMatrix* const> matrices,
                      const float* x, std::size_t batch, float* y) {
  if (matrices.empty() || batch == 0) return;
  const Geometry& geometry = matrices.front()->geometry();
  std::size_t outputs = 0;
  for (const GroupedMatrix* matrix : matrices) {
    if (matrix->geometry().columns != geometry.columns) {
      throw std::invalid_argument("matrices must have the same number of columns");
    }
    outputs += matrix->geometry().rows;
  }
  const Activations activations(
      pool, ActivationRows{x, batch, geometry.columns, geometry.padded_columns(), {}},
      Activations::Layout::kRows);
  std::vector<std::unique_ptr<GroupedVectors>> vectors;  // by group size
  std::vector<GroupedProduct> products;
  std::vector<std::size_t> sizes, first_unit{0};
  std::size_t at = 0;
  for (const GroupedMatrix* matrix : matrices) {
    const std::size_t size = matrix->scales().size;
    if (!matrix->can_flatten()) {
      multiply_by_segments(pool, *matrix, activations, y + at, outputs);
    } else {
      auto found = std::find(sizes.begin(), sizes.end(), size);
      if (found == sizes.end()) {
        vectors.push_back(std::make_unique<GroupedVectors>(
            pool, activations, geometry.padded_columns(), size, geometry.columns));
        found = sizes.insert(sizes.end(), size);
      }
      products.emplace_back(*matrix, *vectors[static_cast<std::size_t>(found - sizes.begin())],
                            y + at, outputs);
      first_unit.push_back(first_unit.back() + products.back().units());
    }
    at += matrix->geometry().rows;
  }
  const std::size_t units = first_unit.back();
  if (units == 0) return;
  const std::size_t most = std::max(pool.size(), units / kTaskUnits);
  const std::size_t tasks =
      std::min({units, most, pool.size() == 1 ? std::size_t{1} : pool.size() * kTasksPerThread});
  std::atomic<std::size_t> corrupt{kNoBlock};
  pool.run(tasks, [&](std::size_t task, std::size_t) {
    const std::size_t begin = units * task / tasks, end = units * (task + 1) / tasks;
    for (std::size_t i = 0; i < products.size(); ++i) {
      const std::size_t from = std::max(begin, first_unit[i]);
      const std::size_t to = std::min(end, first_unit[i + 1]);
      if (from >= to) continue;
      const std::size_t bad = products[i].run(from - first_unit[i], to - first_unit[i]);
      if (bad != kNoBlock) corrupt = bad;
    }
  });
  if (corrupt != kNoBlock) throw_corrupt(corrupt);
}

}  // namespace entrollm
