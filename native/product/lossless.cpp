#include "product/lossless.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "format/words.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kRowsPerTask = 64;

std::uint8_t rotate_back(std::uint8_t symbol) { return std::rotr(symbol, 1); }

float value_of(FloatType type, std::uint8_t word) {
  return type == FloatType::kE4M3 ? e4m3_value(word) : e5m2_value(word);
}

}  // namespace

LosslessMatrix::LosslessMatrix(Symbols symbols, std::span<const std::uint8_t> low, FloatType type)
    : symbols_(symbols), low_(low), type_(type) {
  const std::size_t expected =
      has_low_bytes(type) ? stored_bytes(geometry().rows * geometry().columns) : 0;
  if (low.size() != expected) {
    throw std::invalid_argument("the low bytes take " + std::to_string(low.size()) +
                                " bytes, expected " + std::to_string(expected));
  }
  for (unsigned symbol = 0; symbol < 256 && !has_low_bytes(type); ++symbol) {
    const float value = value_of(type, rotate_back(static_cast<std::uint8_t>(symbol)));
    const auto word = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
    const std::uint16_t rotated = std::rotl(word, 1);
    wide_high_[symbol] = static_cast<std::uint8_t>(rotated >> 8);
    wide_low_[symbol] = static_cast<std::uint8_t>(rotated);
  }
}

std::size_t LosslessMatrix::decode_rows(std::size_t row_block, std::uint8_t* out) const {
  if (const CodedMatrix* matrix = coded()) return matrix->decode_rows(row_block, out);
  flat()->unpack(row_block * geometry().block_rows, geometry().rows_in(row_block), out);
  return SIZE_MAX;
}

void LosslessMatrix::widen(const std::uint8_t* symbols, std::size_t count, std::uint8_t* high,
                           std::uint8_t* low) const {
  const auto map = kernels().encode->map_symbols;
  map(symbols, count, 0xff, wide_high_.data(), high);
  map(symbols, count, 0xff, wide_low_.data(), low);
}

void LosslessMatrix::row_words(std::size_t row, const std::uint8_t* symbols,
                               std::uint8_t* out) const {
  const std::size_t columns = geometry().columns;
  if (!has_low_bytes(type_)) {
    std::transform(symbols, symbols + columns, out, rotate_back);
    return;
  }
  kernels().lossless->join(symbols, low(row), columns, reinterpret_cast<std::uint16_t*>(out));
}

void LosslessMatrix::row_values(std::size_t row, const std::uint8_t* symbols, float* out) const {
  const std::size_t columns = geometry().columns;
  std::uint16_t words[kVector];
  for (std::size_t j = 0; j < columns; j += kVector) {
    const std::size_t count = std::min(kVector, columns - j);
    std::uint8_t high[kVector], wide_low[kVector];
    const std::uint8_t* low_bytes = wide_low;
    if (has_low_bytes(type_)) {
      low_bytes = low(row) + j;
      std::memcpy(high, symbols + j, count);
    } else {
      widen(symbols + j, count, high, wide_low);
    }
    kernels().lossless->join(high, low_bytes, count, words);
    for (std::size_t i = 0; i < count; ++i) {
      out[j + i] = type_ == FloatType::kHalf ? half_value(words[i]) : bfloat16_value(words[i]);
    }
  }
}

void LosslessMatrix::words(ThreadPool& pool, std::size_t begin, std::size_t end,
                           std::uint8_t* out) const {
  const std::size_t columns = geometry().columns;
  if (begin > end || end > geometry().rows) throw std::invalid_argument("rows out of range");
  if (begin == end) return;
  const std::size_t first = begin / geometry().block_rows;
  const std::size_t last = (end - 1) / geometry().block_rows + 1;
  std::atomic<std::size_t> bad_block{SIZE_MAX};
  pool.run(last - first, [&](std::size_t task, std::size_t) {
    const std::size_t row_block = first + task;
    const std::size_t from = std::max(begin, row_block * geometry().block_rows);
    const std::size_t to = std::min(end, (row_block + 1) * geometry().block_rows);
    std::vector<std::uint8_t> symbols(geometry().block_rows * geometry().padded_columns());
    const std::size_t bad = decode_rows(row_block, symbols.data());
    if (bad != SIZE_MAX) {
      bad_block = bad;
      return;
    }
    for (std::size_t row = from; row < to; ++row) {
      row_words(row, symbols.data() + (row % geometry().block_rows) * geometry().padded_columns(),
                out + (row - begin) * columns * word_bytes(type_));
    }
  });
  if (bad_block != SIZE_MAX) throw_corrupt(bad_block);
}

void LosslessMatrix::dequantize(ThreadPool& pool, std::span<const std::int64_t> rows,
                                float* out) const {
  check_rows(geometry(), rows);
  std::atomic<std::size_t> bad_block{SIZE_MAX};
  pool.run((rows.size() + kRowsPerTask - 1) / kRowsPerTask, [&](std::size_t task, std::size_t) {
    // Neighbouring rows usually share a row block, so that the last one is kept decoded.
    std::vector<std::uint8_t> symbols(geometry().block_rows * geometry().padded_columns());
    std::size_t decoded = SIZE_MAX;
    const std::size_t end = std::min(rows.size(), (task + 1) * kRowsPerTask);
    for (std::size_t n = task * kRowsPerTask; n < end; ++n) {
      const auto row = static_cast<std::size_t>(rows[n]);
      const std::size_t row_block = row / geometry().block_rows;
      if (row_block != decoded) {
        const std::size_t bad = decode_rows(row_block, symbols.data());
        if (bad != SIZE_MAX) {
          bad_block = bad;
          return;
        }
        decoded = row_block;
      }
      row_values(row, symbols.data() + (row % geometry().block_rows) * geometry().padded_columns(),
                 out + n * geometry().columns);
    }
  });
  if (bad_block != SIZE_MAX) throw_corrupt(bad_block);
}

}  // namespace entrollm
