// Goes through the blocks of a matrix with a cascade code. Lists are decoded to memory; an action
// decodes the root and takes its symbols from registers.
#pragma once

#include "kernels/generic/instantiations.hpp"
#include "kernels/generic/sparse_kernels_of.hpp"
#include "kernels/x86/avx512_root.hpp"

namespace entrollm {
namespace {

// Stream bytes are requested this far ahead of their use. The hardware prefetcher does not keep up
// with many streams of a few kilobytes.
constexpr std::size_t kPrefetchBytes = 3072;

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Where the lists of one block are.
struct Lists {
  std::size_t counts[kMaxLevels];
  std::size_t begins[kMaxLevels];  // offsets in the block's sparse part
  bool valid;
};

// Finds the lengths of a block's lists from the root down; measure_lists() in codec/decode.cpp says
// why they are safe to use. The result is written in place, because reading a copy would have to
// wait until the copy has reached the cache.
inline void measure(const Cascade& code, const std::uint8_t* sparse, std::size_t size,
                    std::size_t count, Lists& lists) {
  lists.valid = false;
  if (size < 2) return;
  std::size_t length = sparse[0] | static_cast<std::size_t>(sparse[1]) << 8;
  if (length > count) return;
  std::size_t at = 2;
  for (int level = 1; level < code.levels; ++level) {
    const int bits = code.bits[level];
    lists.counts[level] = length;
    lists.begins[level] = at;
    at += sparse_bytes(length, bits);
    if (at > size) return;
    if (level + 1 < code.levels) {
      length = count_all_ones(sparse + lists.begins[level], length, bits);
    }
  }
  lists.valid = at == size;
}

// Decodes the lists into `scratch`, the lowest level first, and returns the first level's symbols.
inline const std::uint8_t* decode_lists(const Cascade& code, const Lists& lists,
                                        const std::uint8_t* sparse, std::uint8_t* scratch) {
  const std::uint8_t* child = nullptr;
  for (int level = code.levels - 1; level >= 1; --level) {
    const std::size_t count = lists.counts[level];
    const FieldArgs args{sparse + lists.begins[level], count, code.bits[level], code.tables[level],
                         child};
    sparse_field<Avx512Vectors>(args, scratch);
    child = scratch;
    scratch += (count + kVector - 1) / kVector * kVector + kSlack;
  }
  return child;
}

// One block whose lists are decoded.
struct CascadeBlock {
  FieldArgs root;
  const std::uint8_t* low_fields;
  std::size_t first_row;  // counted from the run's first row
  std::size_t rows;
  std::size_t part;
  std::size_t vectors;  // of a row in this part
};

// Calls action(block), which returns the number of escapes in the root's fields, for every block.
// Returns the number of blocks, or the first block that does not decode to its stated length.
template <class Action>
std::size_t for_blocks_of(const CascadeRun& run, Action action) {
  const Cascade& code = *run.code;
  const bool has_lists = code.levels > 1;
  const std::uint8_t* dense = run.dense;
  const auto rows_of = [&](std::size_t row_block) {
    return row_block + 1 == run.row_blocks ? run.last_rows : run.block_rows;
  };
  const auto columns_of = [&](std::size_t part) {
    return part + 1 == run.parts ? run.last_columns : run.block_columns;
  };
  const std::size_t blocks = run.row_blocks * run.parts;
  Lists lists_of[2];  // of this block and of the next
  const auto measure_block = [&](std::size_t block) {
    const std::size_t count = rows_of(block / run.parts) * columns_of(block % run.parts);
    const std::uint8_t* sparse = run.sparse + run.sparse_offsets[block];
    const std::size_t size = run.sparse_offsets[block + 1] - run.sparse_offsets[block];
    measure(code, sparse, size, count, lists_of[block % 2]);
  };
  if (has_lists) measure_block(0);
  std::size_t block = 0;
  for (std::size_t row_block = 0; row_block < run.row_blocks; ++row_block) {
    const std::size_t rows = rows_of(row_block);
    for (std::size_t part = 0; part < run.parts; ++part, ++block) {
      const std::size_t columns = columns_of(part);
      const std::size_t count = rows * columns;
      const std::uint8_t* child = nullptr;
      const Lists& lists = lists_of[block % 2];
      if (has_lists) {
        if (!lists.valid) return block;
        const std::uint8_t* sparse = run.sparse + run.sparse_offsets[block];
        const std::size_t size = run.sparse_offsets[block + 1] - run.sparse_offsets[block];
        for (std::size_t at = 0; at < size; at += 64) {
          prefetch(sparse + size + kPrefetchBytes / 2 + at);
        }
        // Each length of the next block waits for the one before it. Started now, that chain runs
        // beside this block's work.
        if (block + 1 < blocks) measure_block(block + 1);
        child = decode_lists(code, lists, sparse, run.lists);
      }
      const std::size_t root_bytes = dense_bytes(count, code.bits[0]);
      const std::size_t escapes =
          action(CascadeBlock{{dense, count, code.bits[0], code.tables[0], child},
                              dense + root_bytes,
                              row_block * run.block_rows,
                              rows,
                              part,
                              columns / kVector});
      if (has_lists && escapes != lists.counts[1]) return block;
      dense += root_bytes + (code.low_bits == 0 ? 0 : dense_bytes(count, code.low_bits));
    }
  }
  return blocks;
}

// Calls step.operator()<Step>(eight) for the vectors of `eights` eights from `first` on, and
// requests the bytes that later ones read.
template <int Bits, int Low, class Step>
inline void for_eights(const std::uint8_t* fields, std::size_t first, std::size_t eights,
                       Step step) {
  constexpr std::size_t kStepBytes = static_cast<std::size_t>(Bits + Low) * 64;
  const std::uint8_t* ahead = fields + kPrefetchBytes + first * kStepBytes;
  for (std::size_t eight = first; eight < first + eights; ++eight, ahead += kStepBytes) {
    for (std::size_t line = 0; line < kStepBytes; line += 64) prefetch(ahead + line);
    for_steps(eight, step, EightSteps());
  }
}

// Action<Bits, Escape, Low>::run for a code's root. All of them have the same type.
template <template <int, bool, int> class Action>
auto choose_action(const Cascade& code) {
  // make_cascade() has checked that the root has field bits, and few low bits.
  constexpr int kLows = kMaxCascadeLowBits + 1;
  constexpr int kLast = kMaxFieldBits * kLows - 1;
  const int index = (code.bits[0] - 1) * kLows + code.low_bits;
  return code.levels > 1
             ? instantiation<0, kLast>(
                   index, []<int I>() { return &Action<I / kLows + 1, true, I % kLows>::run; })
             : instantiation<0, kLast>(
                   index, []<int I>() { return &Action<I / kLows + 1, false, I % kLows>::run; });
}

}  // namespace
}  // namespace entrollm
