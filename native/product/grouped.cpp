#include "product/grouped.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>

#include "codec/decode.hpp"
#include "format/flat.hpp"
#include "product/activations.hpp"
#include "product/grouped_by_segments.hpp"
#include "product/grouped_tile.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kTasksPerThread = 8;

// Least units of a task: fields are fetched some kilobytes ahead, which in a shorter task are those
// of another one.
constexpr std::size_t kTaskUnits = 8;

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

// Row blocks that end where tiles do, or at the last row.
std::size_t stripe_blocks(const Geometry& geometry) {
  return kGroupedRows / std::gcd(geometry.block_rows, kGroupedRows);
}

std::size_t stripe_count(const Geometry& geometry) {
  return (geometry.row_blocks() - 1) / stripe_blocks(geometry) + 1;
}

// Decodes a stripe and calls take(first row, rows, tile) for each of its tiles. Returns a block
// that does not decode, or kNoBlock.
template <class Take>
std::size_t for_tiles(const GroupedMatrix& matrix, std::size_t stripe, const Take& take) {
  thread_local std::vector<std::uint8_t> symbols, tile;
  const Geometry& geometry = matrix.geometry();
  const std::size_t begin = stripe * stripe_blocks(geometry);
  const std::size_t end = std::min(geometry.row_blocks(), begin + stripe_blocks(geometry));
  const std::size_t rows = geometry.rows_between(begin, end), stride = geometry.padded_columns();
  symbols.resize(rows * stride);
  tile.resize(matrix.steps() * kVector);
  for (std::size_t block = begin; block < end; ++block) {
    const std::size_t first = (block - begin) * geometry.block_rows;
    const std::size_t bad = matrix.coded().decode_rows(block, symbols.data() + first * stride);
    if (bad != kNoBlock) return bad;
  }
  for (std::size_t row = 0; row < rows; row += kGroupedRows) {
    const std::size_t count = std::min(kGroupedRows, rows - row);
    lay_out_tile(symbols.data() + row * stride, count, stride, tile);
    take(begin * geometry.block_rows + row, count, std::span(tile));
  }
  return kNoBlock;
}

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
  tile_bytes_ = steps() * flat_chunk_bytes(bits);
  Arena arena(tiles() * tile_bytes_ + kVector);
  std::uint8_t* fields = arena.allocate(tiles() * tile_bytes_);
  if (fields == nullptr) throw std::bad_alloc();
  std::atomic<std::size_t> corrupt{kNoBlock};
  pool.run(stripe_count(geometry), [&](std::size_t stripe, std::size_t) {
    const auto pack = [&](std::size_t first_row, std::size_t, std::span<std::uint8_t> tile) {
      if (has_table_) {
        for (std::uint8_t& symbol : tile) symbol = numbers[symbol];
      }
      kernels().flat->pack(tile.data(), steps(), bits, 0,
                           fields + first_row / kGroupedRows * tile_bytes_);
    };
    const std::size_t bad = for_tiles(*this, stripe, pack);
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
class GroupedActivations {
 public:
  GroupedActivations(ThreadPool& pool, const Activations& x, std::size_t size, std::size_t columns)
      : x_(x),
        steps_((columns - 1) / kStepColumns + 1),
        groups_((columns - 1) / size + 1),
        digits_(steps_ * places_of_all() * kStepBytes),
        sums_(groups_ * places_of_all()) {
    const std::size_t passes = (x.batch() - 1) / kMostFlatVectors + 1;
    pool.run(passes, [&](std::size_t pass, std::size_t) {
      const std::size_t first = pass * kMostFlatVectors;
      lay_out(first);
      const std::size_t end = std::min(x.batch(), first + kMostFlatVectors);
      for (std::size_t b = first; b < end; ++b) add_up(b, size, columns);
    });
  }

  std::size_t batch() const { return x_.batch(); }
  // Vectors from `first` on, a multiple of kMostFlatVectors, that are multiplied together.
  std::size_t together(std::size_t first) const {
    return std::min(kMostFlatVectors, batch() - first);
  }
  double scale(std::size_t b) const { return x_.scale(b); }

  GroupedVectors from(std::size_t first) const {
    return {digits_.data() + first * steps_ * kStepBytes, places(first),
            sums_.data() + first * groups_, groups_};
  }

 private:
  // Places for the vectors from `first` on, and for all.
  std::size_t places(std::size_t first) const { return std::bit_ceil(together(first)); }
  std::size_t places_of_all() const {
    const std::size_t last = (batch() - 1) / kMostFlatVectors * kMostFlatVectors;
    return last + places(last);
  }

  void lay_out(std::size_t first) {
    const std::size_t count = places(first);
    const bool is_whole = kernels().grouped->takes_whole;
    for (std::size_t i = 0; i < count; ++i) {
      std::int8_t* out = digits_.data() + (first * steps_ + i) * kStepBytes;
      const std::size_t step_bytes = count * kStepBytes;
      if (i >= together(first)) {
        for (std::size_t step = 0; step < steps_; ++step, out += step_bytes) {
          std::memset(out, 0, kStepBytes);
        }
        continue;
      }
      const Digits x = x_.digits(first + i, 0);
      for (std::size_t at = 0; at < steps_ * kStepColumns; at += kStepColumns, out += step_bytes) {
        if (is_whole) {
          const std::int16_t pairs[] = {x.whole[at], x.whole[at + 2], x.whole[at + 1],
                                        x.whole[at + 3]};
          std::memcpy(out, pairs, kStepBytes);
        } else {
          std::memcpy(out, x.high + at, kStepColumns);
          std::memcpy(out + kStepColumns, x.low + at, kStepColumns);
        }
      }
    }
  }

  // The sums of a vector over groups.
  void add_up(std::size_t b, std::size_t size, std::size_t columns) {
    const std::int16_t* whole = x_.digits(b, 0).whole;
    float* out = sums_.data() + b * groups_;
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
  std::size_t steps_;
  std::size_t groups_;
  AlignedArray<std::int8_t> digits_;  // (passes, steps, places, kStepBytes)
  std::vector<float> sums_;           // (places of all, groups)
};

// A thread's buffers, kept between products: terms of the rows of a tile, and by groups.
struct Scratch {
  std::vector<float> scale, shift, spare, scales, shifts;
};

// One matrix times the vectors, whose outputs are `stride` floats apart.
class GroupedProduct {
 public:
  GroupedProduct(const GroupedMatrix& matrix, const GroupedActivations& x, float* y,
                 std::size_t stride)
      : matrix_(matrix), geometry_(matrix.geometry()), x_(x), y_(y), stride_(stride) {}

  // What tasks consist of: tiles, or stripes of coded ones.
  std::size_t units() const {
    return matrix_.is_flat() ? matrix_.tiles() : stripe_count(geometry_);
  }

  // Multiplies units [begin, end). Returns a block that does not decode, or kNoBlock.
  std::size_t run(std::size_t begin, std::size_t end) const {
    for (std::size_t unit = begin; unit < end; ++unit) {
      if (matrix_.is_flat()) {
        const std::size_t first_row = unit * kGroupedRows;
        multiply(first_row, std::min(kGroupedRows, geometry_.rows - first_row),
                 {matrix_.tile_fields(unit), matrix_.steps(), matrix_.bits(), matrix_.table(),
                  matrix_.symbol_bits(), 0, nullptr, nullptr});
        continue;
      }
      const std::size_t bad = for_tiles(
          matrix_, unit,
          [&](std::size_t first_row, std::size_t rows, std::span<const std::uint8_t> tile) {
            multiply(first_row, rows,
                     {tile.data(), matrix_.steps(), 8, nullptr, 8, 0, nullptr, nullptr});
          });
      if (bad != kNoBlock) return bad;
    }
    return kNoBlock;
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch buffers;
    return buffers;
  }

  void multiply(std::size_t first_row, std::size_t rows, GroupedTile tile) const {
    add_terms(first_row, rows, tile);
    float totals[kMostFlatVectors * kGroupedRows];
    for (std::size_t first = 0; first < x_.batch(); first += kMostFlatVectors) {
      kernels().grouped->product(tile, x_.from(first), totals);
      for (std::size_t b = 0; b < x_.together(first); ++b) {
        const double scale = x_.scale(first + b);
        float* out = y_ + (first + b) * stride_ + first_row;
        for (std::size_t row = 0; row < rows; ++row) {
          out[row] = static_cast<float>(totals[b * kGroupedRows + row] * scale);
        }
      }
    }
  }

  // Expands the terms of a tile; those of missing rows are zeros.
  void add_terms(std::size_t first, std::size_t rows, GroupedTile& tile) const {
    Scratch& buffers = scratch();
    const GroupTerms& terms = matrix_.scales().terms;
    const std::size_t size = kGroupedRows * terms.groups;
    for (std::vector<float>* buffer :
         {&buffers.scale, &buffers.shift, &buffers.spare, &buffers.scales, &buffers.shifts}) {
      buffer->resize(size);
    }
    if (rows < kGroupedRows) {
      std::fill(buffers.scale.begin(), buffers.scale.end(), 0.0f);
      std::fill(buffers.shift.begin(), buffers.shift.end(), 0.0f);
    }
    const GroupedKernels& grouped = *kernels().grouped;
    grouped.terms(terms, first, rows, buffers.scale.data(), buffers.shift.data(),
                  buffers.spare.data());
    grouped.transpose(buffers.scale.data(), terms.groups, buffers.scales.data());
    tile.group_steps = matrix_.scales().size / kStepColumns;
    tile.scales = buffers.scales.data();
    if (terms.has_shift()) {
      grouped.transpose(buffers.shift.data(), terms.groups, buffers.shifts.data());
      tile.shifts = buffers.shifts.data();
    }
    if (first + 3 * kGroupedRows <= geometry_.rows) {
      fetch_terms(terms, first + 2 * kGroupedRows, kGroupedRows);
    }
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

  const GroupedMatrix& matrix_;
  const Geometry& geometry_;
  const GroupedActivations& x_;
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
  std::vector<std::unique_ptr<GroupedActivations>> vectors;  // by group size
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
        vectors.push_back(
            std::make_unique<GroupedActivations>(pool, activations, size, geometry.columns));
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
