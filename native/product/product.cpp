#include "product/product.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codec/decode.hpp"
#include "product/activations.hpp"

namespace entrollm {
namespace {

// The number of rows that are decoded before they are multiplied with a batch, and the number of
// the batch's vectors that share one decoding. The rows fit the first-level cache and the vectors
// the second.
constexpr std::size_t kTileRows = 8;
constexpr std::size_t kTileBatch = 128;

// In products of panels with many vectors, panels of kManyRows rows stay in the second-level cache
// while the vectors pass, and so do the sums of kPanelBatch vectors at a time.
constexpr std::size_t kManyRows = 8 * kPanelRows;
constexpr std::size_t kPanelBatch = 64;

// Tasks per thread: the last ones to finish should be short.
constexpr std::size_t kTasksPerThread = 8;

constexpr std::size_t kNone = SIZE_MAX;

// A thread's buffers, kept between products.
struct Buffers {
  std::vector<std::uint8_t> tile;  // decoded rows of one part
  std::vector<std::int64_t> sums;  // (rows of a task or tile, batch)
  AlignedArray<std::uint8_t> panels{0};

  std::uint8_t* reserve_panels(std::size_t size) {
    if (panels.size() < size) panels = AlignedArray<std::uint8_t>(size);
    return panels.data();
  }
};

Buffers& thread_buffers() {
  thread_local Buffers buffers;
  return buffers;
}

// Whether products with `batch` vectors decode to panels. Two vectors are faster without.
bool uses_panels(std::size_t batch) { return batch > 2 && kernels().panel_product != nullptr; }

}  // namespace

// One matrix times the batch. `y` points to the matrix's first output in rows of `y_stride` floats.
class Product {
 public:
  Product(const CodedMatrix& matrix, const Activations& x, float* y, std::size_t y_stride)
      : matrix_(matrix), geometry_(matrix.geometry()), x_(x), y_(y), y_stride_(y_stride) {}

  std::size_t row_blocks() const { return geometry_.row_blocks(); }

  // The number of row blocks that are best multiplied together.
  std::size_t unit() const { return uses_panels(x_.batch()) ? row_blocks_of(2 * kPanelRows) : 1; }

  // Multiplies row blocks [begin, end). Returns a block that does not decode, or kNone.
  std::size_t run(std::size_t begin, std::size_t end) const {
    if (begin == end) return kNone;
    const bool is_cascade = matrix_.cascade_.levels != 0;
    if (uses_panels(x_.batch())) {
      const bool is_few = x_.batch() <= kMostFusedDigitGroups * kDigitGroup;
      return is_few && is_cascade ? run_fused_panels(begin, end) : run_panels(begin, end);
    }
    return x_.batch() <= kMostColumns && is_cascade ? run_fused(begin, end) : run_tiles(begin, end);
  }

 private:
  std::size_t run_fused(std::size_t begin, std::size_t end) const {
    const std::size_t first_row = begin * geometry_.block_rows;
    const std::size_t rows = geometry_.rows_between(begin, end);
    auto& sums = thread_buffers().sums;
    sums.resize(rows * x_.columns());
    CascadeRun run = cascade_run(begin, end);
    run.digits = x_.interleaved();
    run.columns = x_.columns();
    const std::size_t done = kernels().cascade_product(run, sums.data());
    if (done != run.row_blocks * run.parts) return begin * run.parts + done;
    write(first_row, rows, {sums.data(), x_.columns()}, 0, x_.batch());
    return kNone;
  }

  CascadeRun cascade_run(std::size_t begin, std::size_t end) const {
    const std::size_t parts = geometry_.parts();
    DecodeScratch& scratch = thread_scratch(matrix_.code_, matrix_.max_block());
    CascadeRun run{};
    run.code = &matrix_.cascade_;
    run.dense = matrix_.dense_.data() + begin * matrix_.part_offsets_[parts];
    run.sparse = matrix_.sparse_.data();
    run.sparse_offsets =
        matrix_.sparse_offsets_.data() + (matrix_.code_.has_sparse() ? begin * parts : 0);
    run.row_blocks = end - begin;
    run.parts = parts;
    run.block_rows = geometry_.block_rows;
    run.last_rows = geometry_.rows_in(end - 1);
    run.block_columns = geometry_.block_columns;
    run.last_columns = geometry_.columns_in(parts - 1);
    run.buffer = scratch.block();
    run.lists = scratch.lists();
    return run;
  }

  // The number of row blocks that have about `rows` rows, at least one.
  std::size_t row_blocks_of(std::size_t rows) const {
    return std::max<std::size_t>(1, rows / geometry_.block_rows);
  }

  std::size_t row_vectors() const { return geometry_.padded_columns() / kVector; }

  // Decodes and multiplies in one pass, for a few vectors.
  std::size_t run_fused_panels(std::size_t begin, std::size_t end) const {
    const std::size_t unit = row_blocks_of(kPanelRows);
    const std::size_t size = 2 * panel_bytes(unit * geometry_.block_rows, row_vectors());
    std::uint8_t* panels = thread_buffers().reserve_panels(size);
    const PanelProduct product =
        new_product(panels, geometry_.rows_between(begin, end), 0, x_.batch());
    const CascadeRun run = cascade_run(begin, end);
    const std::size_t done = kernels().cascade_digit_groups(
        run, {product.digits, product.digit_groups, unit, panels, product.sums});
    if (done != run.row_blocks * run.parts) return begin * run.parts + done;
    write_panels(product, begin * geometry_.block_rows, 0);
    return kNone;
  }

  // Decodes panels of many rows and multiplies them with all vectors, for many vectors.
  std::size_t run_panels(std::size_t begin, std::size_t end) const {
    const std::size_t step = row_blocks_of(kManyRows);
    std::uint8_t* panels =
        thread_buffers().reserve_panels(panel_bytes(step * geometry_.block_rows, row_vectors()));
    for (std::size_t row_block = begin; row_block < end; row_block += step) {
      const std::size_t last = std::min(end, row_block + step);
      const std::size_t bad = decode_panels(row_block, last, panels);
      if (bad != kNone) return bad;
      for (std::size_t first = 0; first < x_.batch(); first += kPanelBatch) {
        const std::size_t batch = std::min(kPanelBatch, x_.batch() - first);
        const PanelProduct product =
            new_product(panels, geometry_.rows_between(row_block, last), first, batch);
        kernels().panel_product(product);
        write_panels(product, row_block * geometry_.block_rows, first);
      }
    }
    return kNone;
  }

  // Decodes row blocks. Returns a block that does not decode, or kNone.
  std::size_t decode_panels(std::size_t begin, std::size_t end, std::uint8_t* panels) const {
    const std::size_t parts = geometry_.parts();
    if (matrix_.cascade_.levels != 0) {
      const std::size_t done = kernels().cascade_panels(cascade_run(begin, end), panels);
      return done == (end - begin) * parts ? kNone : begin * parts + done;
    }
    DecodeScratch& scratch = thread_scratch(matrix_.code_, matrix_.max_block());
    for (std::size_t row_block = begin; row_block < end; ++row_block) {
      for (std::size_t part = 0; part < parts; ++part) {
        if (!matrix_.decode_part(row_block, part, scratch)) return row_block * parts + part;
        copy_to_panels(scratch.block(), (row_block - begin) * geometry_.block_rows,
                       geometry_.rows_in(row_block), part, panels);
      }
    }
    return kNone;
  }

  // Copies a decoded block of `rows` rows to the panels, from row `first_row` on.
  void copy_to_panels(const std::uint8_t* block, std::size_t first_row, std::size_t rows,
                      std::size_t part, std::uint8_t* panels) const {
    const std::size_t first = part * geometry_.block_columns / kVector;
    const std::size_t vectors = geometry_.columns_in(part) / kVector;
    for (std::size_t row = 0; row < rows; ++row) {
      std::uint8_t* to = panels + panel_offset(first_row + row, first, row_vectors());
      for (std::size_t i = 0; i < vectors; ++i, block += kVector, to += kPanelStep) {
        std::memcpy(to, block, kVector);
      }
    }
  }

  // The product of panels with vectors [first, first + batch), whose sums are in the thread's
  // buffer. `first` is a multiple of kDigitGroup.
  PanelProduct new_product(const std::uint8_t* panels, std::size_t rows, std::size_t first,
                           std::size_t batch) const {
    const std::size_t digit_groups = (batch + kDigitGroup - 1) / kDigitGroup;
    auto& sums = thread_buffers().sums;
    sums.assign(digit_groups * rows * kDigitGroup, 0);
    const std::int8_t* digits = x_.digit_groups(first / kDigitGroup);
    return {panels, rows, row_vectors(), digits, digit_groups, sums.data()};
  }

  // Scales and writes the sums of a product. Its rows begin at `first_row` of the matrix, its
  // vectors at `first` of the batch.
  void write_panels(const PanelProduct& product, std::size_t first_row, std::size_t first) const {
    static constexpr float kNoOffset = 0.0f;
    const Scales& scales = matrix_.scales_;
    SumScaling scaling{};
    scaling.rows = product.rows;
    scaling.scale_step = scales.scale.size() > 1 ? 1 : 0;
    scaling.scales = scales.scale.data() + first_row * scaling.scale_step;
    scaling.offset_step = scales.offset.size() > 1 ? 1 : 0;
    scaling.offsets =
        scales.offset.empty() ? &kNoOffset : scales.offset.data() + first_row * scaling.offset_step;
    scaling.stride = y_stride_;
    for (std::size_t group = 0; group < product.digit_groups; ++group) {
      double x_sums[kDigitGroup] = {}, x_scales[kDigitGroup] = {};
      const std::size_t begin = first + group * kDigitGroup;
      scaling.columns = std::min(kDigitGroup, x_.batch() - begin);
      for (std::size_t i = 0; i < scaling.columns; ++i) {
        x_sums[i] = static_cast<double>(x_.sum(begin + i));
        x_scales[i] = x_.scale(begin + i);
      }
      scaling.sums = product.sums + group * product.rows * kDigitGroup;
      scaling.x_sums = x_sums;
      scaling.x_scales = x_scales;
      scaling.out = y_ + begin * y_stride_ + first_row;
      kernels().floats->scale_sums(scaling);
    }
  }

  std::size_t run_tiles(std::size_t begin, std::size_t end) const {
    for (std::size_t first = 0; first < x_.batch(); first += kTileBatch) {
      const std::size_t batch = std::min(kTileBatch, x_.batch() - first);
      const std::size_t bad = run_batch(begin, end, first, batch);
      if (bad != kNone) return bad;
    }
    return kNone;
  }

  // Multiplies row blocks [begin, end) with vectors [first, first + batch).
  std::size_t run_batch(std::size_t begin, std::size_t end, std::size_t first,
                        std::size_t batch) const {
    const std::size_t step = std::max<std::size_t>(1, kTileRows / geometry_.block_rows);
    DecodeScratch& scratch = thread_scratch(matrix_.code_, matrix_.max_block());
    Buffers& buffers = thread_buffers();
    buffers.tile.resize(step * matrix_.max_block() + kSlack);
    for (std::size_t row_block = begin; row_block < end; row_block += step) {
      const std::size_t last = std::min(end, row_block + step);
      const std::size_t first_row = row_block * geometry_.block_rows;
      const std::size_t rows = geometry_.rows_between(row_block, last);
      buffers.sums.assign(rows * batch, 0);
      for (std::size_t part = 0; part < geometry_.parts(); ++part) {
        const std::size_t width = geometry_.columns_in(part);
        std::uint8_t* tile = buffers.tile.data();
        for (std::size_t i = row_block; i < last; ++i) {
          if (!matrix_.decode_part(i, part, scratch)) {
            return i * geometry_.parts() + part;
          }
          const std::size_t size = geometry_.rows_in(i) * width;
          std::memcpy(tile, scratch.block(), size);
          tile += size;
        }
        multiply_tile(buffers, rows, width, part * geometry_.block_columns, first, batch);
      }
      write(first_row, rows, {buffers.sums.data(), batch}, first, batch);
    }
    return kNone;
  }

  // Adds the products of the tile's rows with columns [begin, begin + width) of the vectors.
  void multiply_tile(Buffers& buffers, std::size_t rows, std::size_t width, std::size_t begin,
                     std::size_t first, std::size_t batch) const {
    const Kernels& isa = kernels();
    const std::uint8_t* tile = buffers.tile.data();
    std::size_t column = 0;
    for (; column + kColumnTile <= batch; column += kColumnTile) {
      Digits x[kColumnTile];
      for (std::size_t i = 0; i < kColumnTile; ++i) x[i] = x_.digits(first + column + i, begin);
      std::size_t row = 0;
      std::int64_t products[2 * kColumnTile];
      if (isa.dot_tile_pair != nullptr) {
        for (; row + 2 <= rows; row += 2) {
          isa.dot_tile_pair(tile + row * width, width, x, width, products);
          std::int64_t* sums = buffers.sums.data() + row * batch + column;
          for (std::size_t i = 0; i < kColumnTile; ++i) sums[i] += products[i];
          for (std::size_t i = 0; i < kColumnTile; ++i)
            sums[batch + i] += products[kColumnTile + i];
        }
      }
      for (; row < rows; ++row) {
        isa.dot_tile(tile + row * width, x, width, products);
        std::int64_t* sums = buffers.sums.data() + row * batch + column;
        for (std::size_t i = 0; i < kColumnTile; ++i) sums[i] += products[i];
      }
    }
    for (; column < batch; ++column) {
      const Digits x = x_.digits(first + column, begin);
      for (std::size_t row = 0; row < rows; ++row) {
        buffers.sums[row * batch + column] += isa.dot(tile + row * width, x, width);
      }
    }
  }

  struct RowSums {
    const std::int64_t* data;
    std::size_t stride;  // sums of a row
  };

  // Scales and writes the sums of vectors [first, first + batch), which come first in each row.
  void write(std::size_t first_row, std::size_t rows, const RowSums& sums, std::size_t first,
             std::size_t batch) const {
    const Scales& scales = matrix_.scales_;
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t i = first_row + row;
      const double scale = scales.scale_of(i);
      const double offset = scales.offset_of(i);
      for (std::size_t column = 0; column < batch; ++column) {
        const double sum = scale * static_cast<double>(sums.data[row * sums.stride + column]) +
                           offset * static_cast<double>(x_.sum(first + column));
        y_[(first + column) * y_stride_ + i] = static_cast<float>(sum * x_.scale(first + column));
      }
    }
  }

  const CodedMatrix& matrix_;
  const Geometry& geometry_;
  const Activations& x_;
  float* y_;
  std::size_t y_stride_;
};

void multiply(ThreadPool& pool, std::span<const CodedMatrix* const> matrices, const float* x,
              std::size_t batch, float* y) {
  std::size_t outputs = 0;
  for (const CodedMatrix* matrix : matrices) outputs += matrix->geometry().rows;
  // Matrices without column scales share one rounding of the activations.
  std::vector<Activations> activations;
  activations.reserve(matrices.size());
  const Activations* shared = nullptr;
  std::vector<Product> products;
  std::size_t first_output = 0;
  for (const CodedMatrix* matrix : matrices) {
    const Geometry& geometry = matrix->geometry();
    const bool own = !matrix->column_scale().empty();
    if (own || shared == nullptr) {
      activations.emplace_back(
          pool,
          ActivationRows{x, batch, geometry.columns, geometry.padded_columns(),
                         matrix->column_scale()},
          uses_panels(batch) ? Activations::Layout::kDigitGroups : Activations::Layout::kRows);
      if (!own) shared = &activations.back();
    }
    products.emplace_back(*matrix, own ? activations.back() : *shared, y + first_output, outputs);
    first_output += geometry.rows;
  }
  struct Task {
    const Product* product;
    std::size_t begin;
    std::size_t end;
  };
  const std::size_t wanted = pool.size() == 1 ? 1 : pool.size() * kTasksPerThread;
  std::vector<Task> tasks;
  for (const Product& product : products) {
    const std::size_t row_blocks = product.row_blocks(), unit = product.unit();
    const std::size_t units = (row_blocks + unit - 1) / unit;
    const std::size_t count = std::min(units, (wanted - 1) / matrices.size() + 1);
    for (std::size_t i = 0; i < count; ++i) {
      tasks.push_back({&product, units * i / count * unit,
                       std::min(row_blocks, units * (i + 1) / count * unit)});
    }
  }
  std::atomic<std::size_t> corrupt{kNone};
  pool.run(tasks.size(), [&](std::size_t task, std::size_t) {
    const Task& work = tasks[task];
    const std::size_t block = work.product->run(work.begin, work.end);
    if (block != kNone) corrupt = block;
  });
  if (corrupt != kNone) throw_corrupt(corrupt);
}

}  // namespace entrollm
