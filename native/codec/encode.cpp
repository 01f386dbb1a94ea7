#include "codec/encode.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

using SymbolMap = std::array<std::uint8_t, 256>;

// The field of a symbol that is not below a node.
constexpr std::uint8_t kAbsent = 0xff;

struct CodeMaps {
  std::vector<SymbolMap> fields;   // for every node, the field of each symbol below it
  std::array<bool, 256> listed{};  // symbols that a field names; a raw field takes only the others
};

// Fills the maps of the subtree at `index` and returns its symbols.
std::vector<std::uint8_t> map_subtree(const Code& code, int index, CodeMaps& maps) {
  const Node& node = code.nodes()[static_cast<std::size_t>(index)];
  SymbolMap& map = maps.fields[static_cast<std::size_t>(index)];
  map.fill(kAbsent);
  std::vector<std::uint8_t> symbols;
  const auto add = [&](std::uint8_t symbol, unsigned field) {
    if (map[symbol] != kAbsent) return;  // the first node that names a symbol codes it
    map[symbol] = static_cast<std::uint8_t>(field);
    symbols.push_back(symbol);
  };
  if (node.kind == NodeKind::kLeaf) {
    add(node.table[0], 0);
  } else if (node.bits == kRawBits) {
    for (unsigned symbol = 0; symbol < 256; ++symbol) {
      if (!maps.listed[symbol]) add(static_cast<std::uint8_t>(symbol), symbol);
    }
  } else if (node.kind == NodeKind::kField) {
    const unsigned escape = (1u << node.bits) - 1;
    const unsigned values = escape + (node.left < 0 ? 1 : 0);
    for (unsigned i = 0; i < values; ++i) add(node.table[i], i);
    if (node.left >= 0) {
      for (std::uint8_t symbol : map_subtree(code, node.left, maps)) add(symbol, escape);
    }
  } else {
    for (std::uint8_t symbol : map_subtree(code, node.left, maps)) add(symbol, 0);
    for (std::uint8_t symbol : map_subtree(code, node.right, maps)) add(symbol, 1);
  }
  return symbols;
}

// The length of a symbol's code in bits. map_subtree() must have returned the symbol for the root.
int code_length(const Code& code, const CodeMaps& maps, std::uint8_t symbol) {
  int length = 0;
  for (std::size_t index = 0;;) {
    const Node& node = code.nodes()[index];
    length += node.bits;
    const std::uint8_t field = maps.fields[index][symbol];
    const bool right = node.kind == NodeKind::kSplit && field == 1;
    const bool ends = node.kind != NodeKind::kSplit && field != (1 << node.bits) - 1;
    if (node.left < 0 || ends) return length;
    index = static_cast<std::size_t>(right ? node.right : node.left);
  }
}

// The symbols that pass through one node, with room for vector stores past their end.
struct List {
  std::vector<std::uint8_t> symbols = std::vector<std::uint8_t>(kMaxBlock + kSlack);
  std::size_t count = 0;
};

class BlockEncoder {
 public:
  BlockEncoder(const Code& code, EncodedRows& out)
      : code_(code),
        out_(out),
        isa_(*kernels().encode),
        fields_(kMaxBlock + kSlack),
        lists_(code.nodes().size()) {
    maps_.fields.resize(code.nodes().size());
    for (const Node& node : code.nodes()) {
      if (node.kind != NodeKind::kField || node.bits == kRawBits) continue;
      const std::size_t values = (std::size_t{1} << node.bits) - (node.left >= 0);
      for (std::size_t i = 0; i < values; ++i) maps_.listed[node.table[i]] = true;
    }
    int best = INT_MAX;
    for (std::uint8_t symbol : map_subtree(code, 0, maps_)) {
      const int length = code_length(code, maps_, symbol);
      if ((symbol & low_mask()) != 0 || length > best || (length == best && symbol > pad_))
        continue;
      best = length;
      pad_ = symbol;
    }
  }

  // The symbol of padded columns. Any symbol would do, since their activations are zero; this one
  // has the shortest code.
  std::uint8_t pad() const { return pad_; }

  // `symbols` has kSlack readable bytes past its end.
  void encode(const std::uint8_t* symbols, std::size_t count) {
    const std::size_t sparse_begin = out_.sparse.size();
    std::memcpy(lists_[0].symbols.data(), symbols, count);
    lists_[0].count = count;
    for (std::size_t i = 0; i < code_.nodes().size(); ++i) encode_node(i);
    if (code_.low_bits() != 0) write_dense(symbols, count, code_.low_bits());
    const std::size_t sparse_size = out_.sparse.size() - sparse_begin;
    if (sparse_size > UINT16_MAX)
      throw std::invalid_argument("the code is too long for its blocks");
    out_.sparse_sizes.push_back(static_cast<std::uint16_t>(sparse_size));
  }

 private:
  unsigned low_mask() const { return (1u << code_.low_bits()) - 1; }

  void encode_node(std::size_t index) {
    const Node& node = code_.nodes()[index];
    const List& list = lists_[index];
    const auto keep = static_cast<std::uint8_t>(~low_mask());
    const std::uint8_t seen = isa_.map_symbols(list.symbols.data(), list.count, keep,
                                               maps_.fields[index].data(), fields_.data());
    // Fields have at most 6 bits, so only kAbsent sets the top one.
    if (node.bits != kRawBits && (seen & 0x80) != 0) {
      throw std::invalid_argument("a symbol is not in the code");
    }
    if (index == 0) {
      write_dense(fields_.data(), list.count, node.bits);
    } else {
      write_sparse(list.count, node.bits);
    }
    distribute(node, list);
    if (index == 0 && node.left >= 0) {
      const std::size_t first = lists_[static_cast<std::size_t>(node.left)].count;
      out_.sparse.push_back(static_cast<std::uint8_t>(first & 0xff));
      out_.sparse.push_back(static_cast<std::uint8_t>(first >> 8));
    }
  }

  // Passes the symbols that this node does not finish to its child lists.
  void distribute(const Node& node, const List& list) {
    if (node.left < 0) return;
    const bool is_split = node.kind == NodeKind::kSplit;
    const auto escape = static_cast<std::uint8_t>((1 << node.bits) - 1);
    select(list, is_split ? std::uint8_t{0} : escape, lists_[static_cast<std::size_t>(node.left)]);
    if (is_split) select(list, 1, lists_[static_cast<std::size_t>(node.right)]);
  }

  void select(const List& list, std::uint8_t field, List& out) {
    out.count =
        isa_.select(list.symbols.data(), fields_.data(), list.count, field, out.symbols.data());
  }

  void write_dense(const std::uint8_t* fields, std::size_t count, int bits) {
    if (bits == 0) return;
    const std::size_t begin = out_.dense.size();
    out_.dense.resize(begin + dense_bytes(count, bits));
    std::uint8_t* at = out_.dense.data() + begin;
    if (bits == kRawBits) {
      std::memcpy(at, fields, count);
      return;
    }
    if (bits & 4) {
      isa_.pack_fields(fields, count, bits & 3 ? (bits & 3) / 2 + 1 : 0, 4, at);
      at += dense_bytes(count, 4);
    }
    if (bits & 2) {
      isa_.pack_fields(fields, count, bits & 1, 2, at);
      at += dense_bytes(count, 2);
    }
    if (bits & 1) isa_.pack_plane(fields, count, 0, at);
  }

  void write_sparse(std::size_t count, int bits) {
    const std::size_t begin = out_.sparse.size();
    out_.sparse.resize(begin + sparse_bytes(count, bits));
    std::uint8_t* at = out_.sparse.data() + begin;
    if (bits == kRawBits) {
      std::copy_n(fields_.data(), count, at);  // `at` is null where nothing is stored
      return;
    }
    for (int bit = 0; bit < bits; ++bit, at += (count + 7) / 8) {
      isa_.pack_plane(fields_.data(), count, bit, at);
    }
  }

  const Code& code_;
  EncodedRows& out_;
  CodeMaps maps_;
  const EncodeKernels& isa_;
  std::vector<std::uint8_t> fields_;
  std::vector<List> lists_;
  std::uint8_t pad_ = 0;
};

}  // namespace

EncodedRows encode_rows(const Code& code, const Geometry& geometry, const std::uint8_t* symbols) {
  EncodedRows out;
  BlockEncoder encoder(code, out);
  std::vector<std::uint8_t> block;
  for (std::size_t row_block = 0; row_block < geometry.row_blocks(); ++row_block) {
    const std::size_t rows = geometry.rows_in(row_block);
    for (std::size_t part = 0; part < geometry.parts(); ++part) {
      const std::size_t width = geometry.columns_in(part);
      const std::size_t begin = part * geometry.block_columns;
      const std::size_t filled = std::min(width, geometry.columns - begin);
      block.assign(rows * width, encoder.pad());
      for (std::size_t row = 0; row < rows; ++row) {
        std::memcpy(block.data() + row * width,
                    symbols + (row_block * geometry.block_rows + row) * geometry.columns + begin,
                    filled);
      }
      encoder.encode(block.data(), block.size());
    }
  }
  return out;
}

}  // namespace entrollm
