// A prefix code as a tree of field and split nodes, parsed and validated from its program bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format/layout.hpp"

namespace entrollm {

inline constexpr std::size_t kMaxNodes = 511;
inline constexpr int kMaxDepth = 64;

// A program has the nodes in preorder, as bytes:
//
//   leaf    0, value
//   field   1, bits, 1 if it has an escape else 0, values, [escape subtree]
//   split   2, left subtree, right subtree
//
// A field node of 1 to 6 bits lists 2^bits values, or one fewer with an escape. One of 8 bits lists
// none: its fields are the symbols themselves. Only the root may be a leaf, which is then the whole
// code.
enum class NodeKind : std::uint8_t { kLeaf = 0, kField = 1, kSplit = 2 };

struct Node {
  NodeKind kind = NodeKind::kLeaf;
  int bits = 0;                          // field width; 1 for a split, 0 for a leaf
  int left = -1;                         // escape subtree of a field, or left subtree of a split
  int right = -1;                        // right subtree of a split
  std::array<std::uint8_t, 64> table{};  // field value -> symbol; table[0] of a leaf
};

class Code {
 public:
  // Throws std::invalid_argument if the program is not exactly one well-formed tree.
  Code(std::span<const std::uint8_t> program, int low_bits);

  const std::vector<Node>& nodes() const { return nodes_; }  // preorder, root first
  const Node& root() const { return nodes_.front(); }
  int low_bits() const { return low_bits_; }

  // Whether blocks have a sparse part. It starts with the length of the root's first child list.
  bool has_sparse() const { return root().left >= 0; }
  // Bytes of the dense part of a block of `count` symbols.
  std::size_t dense_size(std::size_t count) const;

 private:
  int parse(std::span<const std::uint8_t> program, std::size_t& at, int depth);

  std::vector<Node> nodes_;
  int low_bits_;
};

}  // namespace entrollm
