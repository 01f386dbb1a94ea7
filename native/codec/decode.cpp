#include "codec/decode.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

namespace entrollm {
namespace {

std::size_t list_capacity(std::size_t count) {
  return (count + kVector - 1) / kVector * kVector + kSlack;
}

// Finds the lengths and stream positions of all lists, from the root down: a list is as long as its
// parent has escapes (or ones). Every length is at most `count`, so that the lists that
// decode_lists() writes one after the other fit the scratch. Together they must take exactly the
// sparse part.
BlockStatus measure_lists(const Kernels& kernels, const Code& code,
                          std::span<const std::uint8_t> sparse, std::size_t count,
                          DecodeScratch& scratch) {
  const auto& nodes = code.nodes();
  auto& counts = scratch.counts();
  auto& offsets = scratch.stream_offsets();
  if (sparse.size() < 2) return BlockStatus::kCorrupt;
  const std::size_t first = sparse[0] | static_cast<std::size_t>(sparse[1]) << 8;
  if (first > count) return BlockStatus::kCorrupt;
  counts[static_cast<std::size_t>(nodes[0].left)] = static_cast<std::uint32_t>(first);
  if (nodes[0].right >= 0) {
    counts[static_cast<std::size_t>(nodes[0].right)] = static_cast<std::uint32_t>(count - first);
  }
  std::size_t at = 2;
  for (std::size_t i = 1; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    offsets[i] = static_cast<std::uint32_t>(at);
    at += sparse_bytes(counts[i], node.bits);
    if (at > sparse.size()) return BlockStatus::kCorrupt;
    if (node.left < 0) continue;
    const std::size_t ones =
        kernels.count_all_ones(sparse.data() + offsets[i], counts[i], node.bits);
    const bool is_split = node.kind == NodeKind::kSplit;
    counts[static_cast<std::size_t>(node.left)] =
        static_cast<std::uint32_t>(is_split ? counts[i] - ones : ones);
    if (is_split) counts[static_cast<std::size_t>(node.right)] = static_cast<std::uint32_t>(ones);
  }
  return at == sparse.size() ? BlockStatus::kOk : BlockStatus::kCorrupt;
}

// Nodes are in preorder, where children follow their parent. Going backwards, every child's list is
// ready when its parent needs it.
void decode_lists(const Kernels& kernels, const Code& code, std::span<const std::uint8_t> sparse,
                  DecodeScratch& scratch) {
  const auto& nodes = code.nodes();
  auto& outputs = scratch.outputs();
  std::uint8_t* out = scratch.lists();
  for (std::size_t i = nodes.size() - 1; i >= 1; --i) {
    const Node& node = nodes[i];
    const std::size_t count = scratch.counts()[i];
    const std::uint8_t* fields = sparse.data() + scratch.stream_offsets()[i];
    if (node.kind == NodeKind::kSplit) {
      kernels.split(fields, count, outputs[static_cast<std::size_t>(node.left)],
                    outputs[static_cast<std::size_t>(node.right)], out);
    } else {
      const std::uint8_t* child =
          node.left < 0 ? nullptr : outputs[static_cast<std::size_t>(node.left)];
      kernels.sparse_field({fields, count, node.bits, node.table.data(), child}, out);
    }
    outputs[i] = out;
    out += list_capacity(count);
  }
}

}  // namespace

void DecodeScratch::Free::operator()(std::uint8_t* p) const { std::free(p); }

void DecodeScratch::reserve(const Code& code, std::size_t max_block) {
  const std::size_t nodes = code.nodes().size();
  // Each by itself: an earlier call may have run out of memory between two of them.
  if (counts_.size() < nodes) counts_.resize(nodes);
  if (stream_offsets_.size() < nodes) stream_offsets_.resize(nodes);
  if (outputs_.size() < nodes) outputs_.resize(nodes);
  // If a corrupt stream has more escapes than its header says, the last list may be read a whole
  // block past its start. One spare list makes room for that.
  const std::size_t size = list_capacity(max_block) * (nodes + 1);
  list_begin_ = list_capacity(max_block);
  if (size <= size_) return;
  // With zeroed memory, damaged streams give repeatable results. Untouched pages cost nothing.
  memory_.reset(static_cast<std::uint8_t*>(std::calloc(size, 1)));
  size_ = memory_ == nullptr ? 0 : size;
  if (memory_ == nullptr) throw std::bad_alloc();
}

DecodeScratch& thread_scratch(const Code& code, std::size_t max_block) {
  thread_local DecodeScratch scratch;
  scratch.reserve(code, max_block);
  return scratch;
}

BlockStatus decode_block(const Kernels& kernels, const Code& code, const std::uint8_t* dense,
                         std::span<const std::uint8_t> sparse, std::size_t count,
                         DecodeScratch& scratch) {
  const Node& root = code.root();
  std::uint8_t* out = scratch.block();
  if (code.has_sparse()) {
    if (measure_lists(kernels, code, sparse, count, scratch) != BlockStatus::kOk) {
      return BlockStatus::kCorrupt;
    }
    decode_lists(kernels, code, sparse, scratch);
  } else if (!sparse.empty()) {
    return BlockStatus::kCorrupt;
  }
  if (root.kind == NodeKind::kLeaf) {
    std::memset(out, root.table[0], count);
  } else if (root.kind == NodeKind::kField) {
    const std::uint8_t* child =
        root.left < 0 ? nullptr : scratch.outputs()[static_cast<std::size_t>(root.left)];
    const std::size_t escapes =
        kernels.dense_field({dense, count, root.bits, root.table.data(), child}, out);
    if (child != nullptr && escapes != scratch.counts()[static_cast<std::size_t>(root.left)]) {
      return BlockStatus::kCorrupt;
    }
  } else {
    const std::size_t ones = kernels.count_all_ones(dense, count, 1);
    if (ones != scratch.counts()[static_cast<std::size_t>(root.right)])
      return BlockStatus::kCorrupt;
    kernels.split(dense, count, scratch.outputs()[static_cast<std::size_t>(root.left)],
                  scratch.outputs()[static_cast<std::size_t>(root.right)], out);
  }
  if (code.low_bits() != 0) {
    const std::size_t root_bytes = root.bits == 0 ? 0 : dense_bytes(count, root.bits);
    kernels.or_low_bits(dense + root_bytes, count, code.low_bits(), out);
  }
  return BlockStatus::kOk;
}

}  // namespace entrollm
