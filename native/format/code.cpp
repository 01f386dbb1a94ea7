#include "format/code.hpp"

#include <stdexcept>

namespace entrollm {
namespace {

std::uint8_t next_byte(std::span<const std::uint8_t> program, std::size_t& at) {
  if (at >= program.size()) throw std::invalid_argument("the code tree ends early");
  return program[at++];
}

}  // namespace

Code::Code(std::span<const std::uint8_t> program, int low_bits) : low_bits_(low_bits) {
  if (low_bits < 0 || low_bits > kMaxLowBits) {
    throw std::invalid_argument("low_bits must be between 0 and 6");
  }
  std::size_t at = 0;
  parse(program, at, 0);
  if (at != program.size()) throw std::invalid_argument("bytes are left over after the code tree");
}

int Code::parse(std::span<const std::uint8_t> program, std::size_t& at, int depth) {
  if (depth > kMaxDepth) throw std::invalid_argument("the code tree is too deep");
  if (nodes_.size() >= kMaxNodes) throw std::invalid_argument("the code tree has too many nodes");
  const auto index = nodes_.size();
  nodes_.emplace_back();
  Node node;
  switch (next_byte(program, at)) {
    case 0:
      if (depth != 0) throw std::invalid_argument("a leaf node below the root of the code tree");
      node.kind = NodeKind::kLeaf;
      node.table.fill(next_byte(program, at));
      break;
    case 1: {
      node.kind = NodeKind::kField;
      node.bits = next_byte(program, at);
      const std::uint8_t escape = next_byte(program, at);
      const bool raw = node.bits == kRawBits;
      if (escape > 1 || (raw ? escape != 0 : node.bits < 1 || node.bits > kMaxFieldBits)) {
        throw std::invalid_argument("a field node of the code tree has an impossible width");
      }
      const std::size_t values = raw ? 0 : (std::size_t{1} << node.bits) - escape;
      for (std::size_t i = 0; i < values; ++i) node.table[i] = next_byte(program, at);
      if (escape != 0) node.left = parse(program, at, depth + 1);
      break;
    }
    case 2:
      node.kind = NodeKind::kSplit;
      node.bits = 1;
      node.left = parse(program, at, depth + 1);
      node.right = parse(program, at, depth + 1);
      break;
    default:
      throw std::invalid_argument("unknown node kind in the code tree");
  }
  nodes_[index] = node;
  return static_cast<int>(index);
}

std::size_t Code::dense_size(std::size_t count) const {
  return (root().bits == 0 ? 0 : dense_bytes(count, root().bits)) +
         (low_bits_ == 0 ? 0 : dense_bytes(count, low_bits_));
}

}  // namespace entrollm
