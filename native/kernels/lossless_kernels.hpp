// The primitives of lossless matrices, whose weights keep the bits that they had.
//
// A word of 16 bits is rotated left by one bit and stored as two bytes: the high one, which is
// coded, has the exponent first, and the low one, which is not, has the sign last.
//
// Sums are defined by columns, not by registers, so that all instruction sets give the same bits.
// Every chunk of kVector columns is four runs of sixteen weights, and a sum has a lane for each of
// them, to which their products are added by one fused multiply-add in float32. In the end, lanes
// are added in pairs: those that are half as far from the first as there are lanes, and so on.
// lossless_column() says which columns a run has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/layout.hpp"

namespace entrollm {

// What words of 16 bits stand for.
enum class WordFormat : std::uint8_t { kBfloat16, kHalf };

inline constexpr std::size_t kLosslessRun = 16;
inline constexpr std::size_t kLosslessLanes = kVector;

// The column in its chunk of weight `lane` of run `run`. Bytes that lie side by side in a register
// of 16 bytes become words by interleaving, and then floats: the even and the odd words of bfloat16
// apart, those of half precision in order.
constexpr std::size_t lossless_column(WordFormat format, std::size_t run, std::size_t lane) {
  const std::size_t of_half = 16 * (lane / 4) + 8 * (run / 2);
  return format == WordFormat::kBfloat16 ? of_half + 2 * (lane % 4) + run % 2
                                         : of_half + 4 * (run % 2) + lane % 4;
}

// A row, or the part of it that consists of whole chunks, and activations in the order of runs.
struct LosslessRow {
  const std::uint8_t* high;
  const std::uint8_t* low;
  std::size_t chunks;
  const float* x;        // of the first vector
  std::size_t x_stride;  // floats from a vector to the next
  std::size_t vectors;   // at least 1
  float* lanes;          // (vectors, kLosslessLanes), added to
};

// Rows of weights and activation vectors, all as floats in the order of runs.
struct LosslessPanel {
  const float* weights;
  std::size_t stride;  // floats from a row to the next
  std::size_t rows;
  const float* x;
  std::size_t x_stride;  // floats from a vector to the next
  std::size_t vectors;
  std::size_t chunks;
  float* lanes;  // (rows, vectors, kLosslessLanes), added to
};

struct CascadeRun;

// The low bytes and the activations of a run of row blocks, for products that decode on the way.
struct LosslessRun {
  const std::uint8_t* low;  // of the run's first row
  const float* x;           // of `vectors` vectors, in the order of runs
  std::size_t x_stride;     // floats from a vector to the next
  std::size_t columns;      // of a row, a multiple of kVector
  std::size_t vectors;      // 1, 2 or 4
  float* lanes;             // (rows, vectors, kLosslessLanes), overwritten
};

inline constexpr std::size_t kMostFusedLossless = 4;
// The widest root of a cascade that fused products take; none take low bits.
inline constexpr int kMostFusedRootBits = 4;

struct LosslessKernels {
  // Divides `count` words.
  void (*split)(const std::uint16_t* words, std::size_t count, std::uint8_t* high,
                std::uint8_t* low);

  // Undoes split.
  void (*join)(const std::uint8_t* high, const std::uint8_t* low, std::size_t count,
               std::uint16_t* words);

  // Adds the products of a row of either format.
  void (*add_bfloat16)(const LosslessRow& row);
  void (*add_half)(const LosslessRow& row);

  // Writes the weights of whole chunks as floats in the order of runs, for panels.
  void (*expand_bfloat16)(const std::uint8_t* high, const std::uint8_t* low, std::size_t chunks,
                          float* weights);
  void (*expand_half)(const std::uint8_t* high, const std::uint8_t* low, std::size_t chunks,
                      float* weights);

  // Adds the products of all rows of a panel with all vectors.
  void (*add_panel)(const LosslessPanel& panel);

  // Adds up the lanes of `count` sums.
  void (*sum_lanes)(const float* lanes, std::size_t count, float* sums);

  // Optional. The products of a run with a cascade code and bfloat16 words, decoded and multiplied
  // in one pass; all of its blocks have multiples of 8 vectors of columns. Returns the number of
  // blocks, or the first block that does not decode to its stated length.
  std::size_t (*cascade_bfloat16)(const CascadeRun& run, const LosslessRun& product) = nullptr;
};

extern const LosslessKernels kScalarLosslessKernels;
extern const LosslessKernels kAvx2LosslessKernels;
extern const LosslessKernels kAvx512LosslessKernels;
extern const LosslessKernels kNeonLosslessKernels;

}  // namespace entrollm
