// Matrices whose weights keep the bits that they had, and their products.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>

#include "kernels/lossless_kernels.hpp"
#include "product/flat_matrix.hpp"
#include "product/matrix.hpp"
#include "threads/pool.hpp"

namespace entrollm {

enum class FloatType : std::uint8_t { kBfloat16, kHalf, kE4M3, kE5M2 };

constexpr bool has_low_bytes(FloatType type) {
  return type == FloatType::kBfloat16 || type == FloatType::kHalf;
}

// Bytes of a weight.
constexpr std::size_t word_bytes(FloatType type) { return has_low_bytes(type) ? 2 : 1; }

// Reads the high bytes of its words, rotated left by one bit, from a coded or a flat matrix, and
// the low ones as they are stored. Words of 8 bits have no low byte.
class LosslessMatrix {
 public:
  // The matrix of the high bytes.
  using Symbols = std::variant<const CodedMatrix*, const FlatMatrix*>;

  // `low` is rows * columns bytes with their padding, or empty for words of 8 bits. It and the
  // matrix of the high bytes must outlive this. Throws std::invalid_argument if its size is
  // another.
  LosslessMatrix(Symbols symbols, std::span<const std::uint8_t> low, FloatType type);

  const Geometry& geometry() const {
    return std::visit([](const auto* m) -> const Geometry& { return m->geometry(); }, symbols_);
  }
  // The matrix of the high bytes if it has this form, or nullptr.
  const CodedMatrix* coded() const { return if_held<CodedMatrix>(); }
  const FlatMatrix* flat() const { return if_held<FlatMatrix>(); }
  FloatType type() const { return type_; }
  // As which words products read the weights: those of 8 bits are exact in bfloat16.
  WordFormat format() const {
    return type_ == FloatType::kHalf ? WordFormat::kHalf : WordFormat::kBfloat16;
  }

  // Writes the symbols of a row block, padded columns included, to out: (rows, padded columns).
  // Returns a block that does not decode, or SIZE_MAX.
  std::size_t decode_rows(std::size_t row_block, std::uint8_t* out) const;

  // Writes the words of rows [begin, end) to out, word_bytes() each, for which it is aligned.
  // Throws CorruptBlock.
  void words(ThreadPool& pool, std::size_t begin, std::size_t end, std::uint8_t* out) const;

  // Writes the values of `rows` to out, (rows.size(), columns). Throws CorruptBlock.
  void dequantize(ThreadPool& pool, std::span<const std::int64_t> rows, float* out) const;

  // The low bytes of a row, for words of 16 bits.
  const std::uint8_t* low(std::size_t row) const { return low_.data() + row * geometry().columns; }

  // Turns the symbols of words of 8 bits into the bytes of rotated bfloat16 words.
  void widen(const std::uint8_t* symbols, std::size_t count, std::uint8_t* high,
             std::uint8_t* low) const;

 private:
  void row_words(std::size_t row, const std::uint8_t* symbols, std::uint8_t* out) const;
  void row_values(std::size_t row, const std::uint8_t* symbols, float* out) const;

  template <class T>
  const T* if_held() const {
    const auto* found = std::get_if<const T*>(&symbols_);
    return found == nullptr ? nullptr : *found;
  }

  Symbols symbols_;
  std::span<const std::uint8_t> low_;
  FloatType type_;
  // By symbol, of words of 8 bits.
  std::array<std::uint8_t, 256> wide_high_{};
  std::array<std::uint8_t, 256> wide_low_{};
};

// y[b, :] = the products of all matrices with x[b, :], side by side; x is (batch, columns) and y
// (batch, sum of rows), both row-major. Activations are not rounded. Sums are in float32, in the
// order that kernels/lossless_kernels.hpp defines, and depend neither on the batch nor on the
// threads and the instruction set. Throws CorruptBlock if a block does not decode.
void multiply_lossless(ThreadPool& pool, std::span<const LosslessMatrix* const> matrices,
                       const float* x, std::size_t batch, float* y);

}  // namespace entrollm
