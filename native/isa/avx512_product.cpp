// Decode and multiply in one pass: the root's symbols go from registers into the dot product, and
// only the short lists below it are written to memory.
#include "isa/avx512_common.hpp"
#include "isa/avx512_parts.hpp"

namespace entrollm {
namespace {

// How far ahead of their use stream bytes are requested. Many streams of a few kilobytes defeat the
// hardware prefetcher.
constexpr std::size_t kPrefetchBytes = 3072;

// Where the lists of one block are: positions are offsets in its sparse part.
struct Lists {
  std::size_t counts[kMaxLevels];
  std::size_t begins[kMaxLevels];
  bool valid;
};

void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Lengths of a block's lists, top-down; see measure_lists() in codec/decode.cpp for the reasons.
Lists measure(const Cascade& code, const std::uint8_t* sparse, std::size_t size,
              std::size_t count) {
  Lists lists;
  lists.valid = size >= 2;
  if (!lists.valid) return lists;
  std::size_t length = sparse[0] | static_cast<std::size_t>(sparse[1]) << 8;
  std::size_t at = 2;
  lists.valid = length <= count;
  for (int level = 1; level < code.levels && lists.valid; ++level) {
    const int bits = code.bits[level];
    lists.counts[level] = length;
    lists.begins[level] = at;
    at += sparse_bytes(length, bits);
    lists.valid = at <= size;
    if (lists.valid && level + 1 < code.levels) {
      length = count_ones(sparse + lists.begins[level], length, bits);
    }
  }
  lists.valid = lists.valid && at == size;
  return lists;
}

// Decodes the lists bottom-up into `scratch` and returns the first level's symbols.
const std::uint8_t* decode_lists(const Cascade& code, const Lists& lists,
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

// One block: `rows` rows of `vectors` vectors each. Returns the escapes met.
template <int Bits, bool Escape, int Low>
std::size_t multiply_block(const FieldArgs& args, const std::uint8_t* low_fields, std::size_t rows,
                           std::size_t vectors, const Digits& x, std::uint8_t* buffer,
                           std::int64_t* sums) {
  RootDecoder<Bits, Escape, Low> root(args, low_fields);
  constexpr std::size_t kStepBytes = static_cast<std::size_t>(Bits + Low) * 64;
  if (vectors % 8 == 0) {
    const std::uint8_t* ahead = args.fields + kPrefetchBytes;
    std::size_t at = 0;
    for (std::size_t row = 0; row < rows; ++row) {
      DotSums dot;
      for (std::size_t eight = 0; eight < vectors / 8; ++eight, ++at, ahead += kStepBytes) {
        for (std::size_t line = 0; line < kStepBytes; line += 64) prefetch(ahead + line);
        dot.add<0>(root.template next<0>(at), x, eight);
        dot.add<1>(root.template next<1>(at), x, eight);
        dot.add<2>(root.template next<2>(at), x, eight);
        dot.add<3>(root.template next<3>(at), x, eight);
        dot.add<4>(root.template next<4>(at), x, eight);
        dot.add<5>(root.template next<5>(at), x, eight);
        dot.add<6>(root.template next<6>(at), x, eight);
        dot.add<7>(root.template next<7>(at), x, eight);
      }
      sums[row] += dot.total();
    }
    return root.escapes;
  }
  // Rows that end inside a group of eight vectors: decode the block first.
  for_vectors(rows * vectors, [&]<int Step>(std::size_t eight) {
    store(buffer + (eight * 8 + Step) * kVector, root.template next<Step>(eight));
  });
  for (std::size_t row = 0; row < rows; ++row) {
    DotSums dot;
    const std::uint8_t* weights = buffer + row * vectors * kVector;
    for_vectors(vectors, [&]<int Step>(std::size_t eight) {
      dot.add<Step>(load(weights + (eight * 8 + Step) * kVector), x, eight);
    });
    sums[row] += dot.total();
  }
  return root.escapes;
}

using BlockProduct = std::size_t (*)(const FieldArgs&, const std::uint8_t*, std::size_t,
                                     std::size_t, const Digits&, std::uint8_t*, std::int64_t*);

template <int Bits, bool Escape>
BlockProduct choose_low(int low_bits) {
  switch (low_bits) {
    case 0:
      return multiply_block<Bits, Escape, 0>;
    case 1:
      return multiply_block<Bits, Escape, 1>;
    case 2:
      return multiply_block<Bits, Escape, 2>;
    case 3:
      return multiply_block<Bits, Escape, 3>;
    default:
      return multiply_block<Bits, Escape, 4>;
  }
}

template <bool Escape>
BlockProduct choose_bits(int bits, int low_bits) {
  switch (bits) {
    case 1:
      return choose_low<1, Escape>(low_bits);
    case 2:
      return choose_low<2, Escape>(low_bits);
    case 3:
      return choose_low<3, Escape>(low_bits);
    case 4:
      return choose_low<4, Escape>(low_bits);
    case 5:
      return choose_low<5, Escape>(low_bits);
    default:
      return choose_low<6, Escape>(low_bits);
  }
}

}  // namespace

std::size_t cascade_product(const CascadeRun& run, std::int64_t* sums) {
  const Cascade& code = *run.code;
  const bool has_lists = code.levels > 1;
  const BlockProduct multiply = has_lists ? choose_bits<true>(code.bits[0], code.low_bits)
                                          : choose_bits<false>(code.bits[0], code.low_bits);
  const std::uint8_t* dense = run.dense;
  const auto rows_of = [&](std::size_t group) {
    return group + 1 == run.groups ? run.last_rows : run.block_rows;
  };
  const auto columns_of = [&](std::size_t part) {
    return part + 1 == run.parts ? run.last_columns : run.block_columns;
  };
  const std::size_t blocks = run.groups * run.parts;
  const auto measure_block = [&](std::size_t block) {
    const std::size_t count = rows_of(block / run.parts) * columns_of(block % run.parts);
    const std::uint8_t* sparse = run.sparse + run.sparse_offsets[block];
    return measure(code, sparse, run.sparse_offsets[block + 1] - run.sparse_offsets[block], count);
  };
  Lists next{};
  if (has_lists) next = measure_block(0);
  std::size_t block = 0;
  for (std::size_t group = 0; group < run.groups; ++group) {
    const std::size_t rows = rows_of(group);
    std::int64_t* group_sums = sums + group * run.block_rows;
    for (std::size_t row = 0; row < rows; ++row) group_sums[row] = 0;
    for (std::size_t part = 0; part < run.parts; ++part, ++block) {
      const std::size_t columns = columns_of(part);
      const std::size_t count = rows * columns;
      const std::uint8_t* child = nullptr;
      const Lists lists = next;
      if (has_lists) {
        if (!lists.valid) return block;
        const std::uint8_t* sparse = run.sparse + run.sparse_offsets[block];
        const std::size_t size = run.sparse_offsets[block + 1] - run.sparse_offsets[block];
        for (std::size_t at = 0; at < size; at += 64) {
          prefetch(sparse + size + kPrefetchBytes / 2 + at);
        }
        // The next block's lengths are a chain of short waits: start it before this block's work.
        if (block + 1 < blocks) next = measure_block(block + 1);
        child = decode_lists(code, lists, sparse, run.lists);
      }
      const std::size_t root_bytes = dense_bytes(count, code.bits[0]);
      const Digits x = run.x.from(part * run.block_columns);
      const FieldArgs args{dense, count, code.bits[0], code.tables[0], child};
      const std::size_t escapes =
          multiply(args, dense + root_bytes, rows, columns / kVector, x, run.buffer, group_sums);
      if (has_lists && escapes != lists.counts[1]) return block;
      dense += root_bytes + (code.low_bits == 0 ? 0 : dense_bytes(count, code.low_bits));
    }
  }
  return blocks;
}

}  // namespace entrollm
