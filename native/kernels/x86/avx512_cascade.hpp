// Walks the blocks of a cascade-coded matrix: lists are decoded to memory, and an action takes the
// root's symbols from registers.
#pragma once

#include "kernels/x86/avx512_common.hpp"

namespace entrollm {
namespace {

// How far ahead of their use stream bytes are requested. Many streams of a few kilobytes defeat the
// hardware prefetcher.
constexpr std::size_t kPrefetchBytes = 3072;

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Where the lists of one block are: positions are offsets in its sparse part.
struct Lists {
  std::size_t counts[kMaxLevels];
  std::size_t begins[kMaxLevels];
  bool valid;
};

// Lengths of a block's lists, top-down; see measure_lists() in codec/decode.cpp for the reasons.
// The result is written in place: a copy would wait until it has reached the cache.
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
    if (level + 1 < code.levels) length = count_ones(sparse + lists.begins[level], length, bits);
  }
  lists.valid = at == size;
}

// Decodes the lists bottom-up into `scratch` and returns the first level's symbols.
inline const std::uint8_t* decode_lists(const Cascade& code, const Lists& lists,
                                        const std::uint8_t* sparse, std::uint8_t* scratch) {
  const std::uint8_t* child = nullptr;
  for (int level = code.levels - 1; level >= 1; --level) {
    const std::size_t count = lists.counts[level];
    const FieldArgs args{sparse + lists.begins[level], count, code.bits[level], code.tables[level],
                         child};
    sparse_field_any(args, scratch);
    child = scratch;
    scratch += (count + kVector - 1) / kVector * kVector + kSlack;
  }
  return child;
}

// One block with its lists decoded.
struct CascadeBlock {
  FieldArgs root;
  const std::uint8_t* low_fields;
  std::size_t first_row;  // of the run
  std::size_t rows;
  std::size_t part;
  std::size_t vectors;  // of a row in this part
};

// Calls action(block), which returns the escapes it met in the root's fields, for every block.
// Returns the number of blocks, or the first block that does not decode to its stated length.
template <class Action>
std::size_t for_blocks_of(const CascadeRun& run, Action action) {
  const Cascade& code = *run.code;
  const bool has_lists = code.levels > 1;
  const std::uint8_t* dense = run.dense;
  const auto rows_of = [&](std::size_t group) {
    return group + 1 == run.groups ? run.last_rows : run.block_rows;
  };
  const auto columns_of = [&](std::size_t part) {
    return part + 1 == run.parts ? run.last_columns : run.block_columns;
  };
  const std::size_t blocks = run.groups * run.parts;
  Lists lists_of[2];  // of this block and of the next
  const auto measure_block = [&](std::size_t block) {
    const std::size_t count = rows_of(block / run.parts) * columns_of(block % run.parts);
    const std::uint8_t* sparse = run.sparse + run.sparse_offsets[block];
    const std::size_t size = run.sparse_offsets[block + 1] - run.sparse_offsets[block];
    measure(code, sparse, size, count, lists_of[block % 2]);
  };
  if (has_lists) measure_block(0);
  std::size_t block = 0;
  for (std::size_t group = 0; group < run.groups; ++group) {
    const std::size_t rows = rows_of(group);
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
        // The next block's lengths are a chain of short waits: start it before this block's work.
        if (block + 1 < blocks) measure_block(block + 1);
        child = decode_lists(code, lists, sparse, run.lists);
      }
      const std::size_t root_bytes = dense_bytes(count, code.bits[0]);
      const std::size_t escapes =
          action(CascadeBlock{{dense, count, code.bits[0], code.tables[0], child},
                              dense + root_bytes,
                              group * run.block_rows,
                              rows,
                              part,
                              columns / kVector});
      if (has_lists && escapes != lists.counts[1]) return block;
      dense += root_bytes + (code.low_bits == 0 ? 0 : dense_bytes(count, code.low_bits));
    }
  }
  return blocks;
}

// Calls step<Step>(eight) for the vectors of `eights` sets of eight, requesting what the next ones
// read.
template <int Bits, int Low, class Step>
inline void for_eights(const std::uint8_t* fields, std::size_t first, std::size_t eights,
                       Step step) {
  constexpr std::size_t kStepBytes = static_cast<std::size_t>(Bits + Low) * 64;
  const std::uint8_t* ahead = fields + kPrefetchBytes + first * kStepBytes;
  for (std::size_t eight = first; eight < first + eights; ++eight, ahead += kStepBytes) {
    for (std::size_t line = 0; line < kStepBytes; line += 64) prefetch(ahead + line);
    step.template operator()<0>(eight);
    step.template operator()<1>(eight);
    step.template operator()<2>(eight);
    step.template operator()<3>(eight);
    step.template operator()<4>(eight);
    step.template operator()<5>(eight);
    step.template operator()<6>(eight);
    step.template operator()<7>(eight);
  }
}

// Action<Bits, Escape, Low>::run for a code's root; all of them have the same type.
template <template <int, bool, int> class Action, int Bits, bool Escape>
auto choose_low(int low_bits) {
  switch (low_bits) {
    case 0:
      return &Action<Bits, Escape, 0>::run;
    case 1:
      return &Action<Bits, Escape, 1>::run;
    case 2:
      return &Action<Bits, Escape, 2>::run;
    case 3:
      return &Action<Bits, Escape, 3>::run;
    default:
      return &Action<Bits, Escape, 4>::run;
  }
}

template <template <int, bool, int> class Action, bool Escape>
auto choose_bits(int bits, int low_bits) {
  switch (bits) {
    case 1:
      return choose_low<Action, 1, Escape>(low_bits);
    case 2:
      return choose_low<Action, 2, Escape>(low_bits);
    case 3:
      return choose_low<Action, 3, Escape>(low_bits);
    case 4:
      return choose_low<Action, 4, Escape>(low_bits);
    case 5:
      return choose_low<Action, 5, Escape>(low_bits);
    default:
      return choose_low<Action, 6, Escape>(low_bits);
  }
}

template <template <int, bool, int> class Action>
auto choose_action(const Cascade& code) {
  return code.levels > 1 ? choose_bits<Action, true>(code.bits[0], code.low_bits)
                         : choose_bits<Action, false>(code.bits[0], code.low_bits);
}

}  // namespace
}  // namespace entrollm
