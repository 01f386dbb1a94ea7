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

// Program bytes, preorder: leaf = 0, value; field = 1, bits, escape flag, values, [escape subtree];
// split = 2, left subtree, right subtree. A field node of 1-6 bits lists 2^bits values (one fewer
// with an escape); one of 8 bits lists none, its fields are the symbols themselves. A leaf stands
// only at the root, where it is the whole code.
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
  // Throws std::invalid_argument when the program is not exactly one well-formed tree.
  Code(std::span<const std::uint8_t> program, int low_bits);

  const std::vector<Node>& nodes() const { return nodes_; }  // preorder, root first
  const Node& root() const { return nodes_.front(); }
  int low_bits() const { return low_bits_; }

  // Every block starts its sparse part with the length of the root's first child list.
  bool has_sparse() const { return root().left >= 0; }
  std::size_t dense_size(std::size_t count) const;

 private:
  int parse(std::span<const std::uint8_t> program, std::size_t& at, int depth);

  std::vector<Node> nodes_;
  int low_bits_;
};

}  // namespace entrollm
