#include "codec/encode.hpp"

#include <array>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>

namespace entrollm {
namespace {

using SymbolMap = std::array<std::uint8_t, 256>;

// For every node, the field that each symbol below it gets; kAbsent elsewhere.
constexpr std::uint8_t kAbsent = 0xff;

struct CodeMaps {
  std::vector<SymbolMap> fields;
  std::array<bool, 256> listed{};  // symbols that a field names; a raw field takes only the others
};

// Fills the maps of the subtree at `index` and returns its symbols.
std::vector<std::uint8_t> map_subtree(const Code& code, int index, CodeMaps& maps) {
  const Node& node = code.nodes()[static_cast<std::size_t>(index)];
  SymbolMap& map = maps.fields[static_cast<std::size_t>(index)];
  map.fill(kAbsent);
  std::vector<std::uint8_t> symbols;
  const auto add = [&](std::uint8_t symbol, unsigned field) {
    if (map[symbol] != kAbsent) return;  // the first place that names a symbol codes it
    map[symbol] = static_cast<std::uint8_t>(field);
    symbols.push_back(symbol);
  };
  if (node.kind == NodeKind::kLeaf) {
    add(node.table[0], 0);
  } else if (node.bits == 8) {
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

// Bits of a symbol's code; only for symbols that map_subtree() returned for the root.
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

// Gathers bit `bit` of eight fields into one byte, first field lowest.
std::uint8_t gather_bits(const std::uint8_t* fields, int bit) {
  std::uint64_t word;
  std::memcpy(&word, fields, sizeof word);
  word = (word >> bit) & 0x0101010101010101u;
  return static_cast<std::uint8_t>(word * 0x0102040810204080u >> 56);
}

void write_plane(const std::uint8_t* fields, std::size_t count, int bit, std::uint8_t* out) {
  for (std::size_t byte = 0; byte < (count + 7) / 8; ++byte)
    out[byte] = gather_bits(fields + byte * 8, bit);
}

// `width` bits of each field from bit `shift` on, packed in groups (see Kernels::dense_field).
void write_group(const std::uint8_t* fields, std::size_t count, int shift, int width,
                 std::uint8_t* out) {
  const std::size_t per_byte = 8 / static_cast<std::size_t>(width);
  const auto mask = static_cast<std::uint8_t>((1 << width) - 1);
  for (std::size_t vector = 0; vector < count / kVector; ++vector) {
    std::uint8_t* group = out + vector / per_byte * kVector;
    const auto up = static_cast<int>(vector % per_byte) * width;
    for (std::size_t lane = 0; lane < kVector; ++lane) {
      const auto part = static_cast<std::uint8_t>(fields[vector * kVector + lane] >> shift) & mask;
      group[lane] = static_cast<std::uint8_t>(group[lane] | part << up);
    }
  }
}

class BlockEncoder {
 public:
  BlockEncoder(const Code& code, EncodedRows& out)
      : code_(code), out_(out), fields_(kMaxBlock + 8), lists_(code.nodes().size()) {
    maps_.fields.resize(code.nodes().size());
    for (const Node& node : code.nodes()) {
      if (node.kind != NodeKind::kField || node.bits == 8) continue;
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

  // Zero weights would do as padding as well; the cheapest symbol costs least.
  std::uint8_t pad() const { return pad_; }

  void encode(const std::uint8_t* symbols, std::size_t count) {
    const std::size_t sparse_begin = out_.sparse.size();
    auto& list = lists_[0];
    list.assign(symbols, symbols + count);
    if (code_.low_bits() != 0) {
      const auto keep = static_cast<std::uint8_t>(~low_mask());
      for (auto& symbol : list) symbol &= keep;
    }
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
    const auto& list = lists_[index];
    const std::size_t count = list.size();
    if (fields_.size() < count + 8) fields_.resize(count + 8);
    const SymbolMap& map = maps_.fields[index];
    std::uint8_t seen = 0;
    for (std::size_t i = 0; i < count; ++i) {
      fields_[i] = map[list[i]];
      seen |= fields_[i];
    }
    // Fields have at most 6 bits, so only kAbsent sets the top one.
    if (node.bits != 8 && (seen & 0x80) != 0) {
      throw std::invalid_argument("a symbol is not in the code");
    }
    std::memset(fields_.data() + count, 0, 8);
    if (index == 0) {
      write_dense(fields_.data(), count, node.bits);
    } else {
      write_sparse(count, node.bits);
    }
    distribute(node, list);
    if (index == 0 && node.left >= 0) {
      const std::size_t first = lists_[static_cast<std::size_t>(node.left)].size();
      out_.sparse.push_back(static_cast<std::uint8_t>(first & 0xff));
      out_.sparse.push_back(static_cast<std::uint8_t>(first >> 8));
    }
  }

  // Hands the symbols that this node does not finish down to its child lists.
  void distribute(const Node& node, const std::vector<std::uint8_t>& list) {
    if (node.left < 0) return;
    const auto escape = static_cast<std::uint8_t>((1 << node.bits) - 1);
    const bool is_split = node.kind == NodeKind::kSplit;
    select(list, static_cast<std::uint8_t>(is_split ? 0 : escape),
           lists_[static_cast<std::size_t>(node.left)]);
    if (is_split) select(list, 1, lists_[static_cast<std::size_t>(node.right)]);
  }

  void select(const std::vector<std::uint8_t>& list, std::uint8_t field,
              std::vector<std::uint8_t>& out) {
    out.resize(list.size());
    std::size_t kept = 0;
    for (std::size_t i = 0; i < list.size(); ++i) {
      out[kept] = list[i];
      kept += fields_[i] == field;
    }
    out.resize(kept);
  }

  void write_dense(const std::uint8_t* fields, std::size_t count, int bits) {
    if (bits == 0) return;
    const std::size_t begin = out_.dense.size();
    out_.dense.resize(begin + dense_bytes(count, bits));
    std::uint8_t* at = out_.dense.data() + begin;
    if (bits == 8) {
      std::memcpy(at, fields, count);
      return;
    }
    if (bits & 4) {
      write_group(fields, count, bits & 3 ? (bits & 3) / 2 + 1 : 0, 4, at);
      at += dense_bytes(count, 4);
    }
    if (bits & 2) {
      write_group(fields, count, bits & 1, 2, at);
      at += dense_bytes(count, 2);
    }
    if (bits & 1) write_plane(fields, count, 0, at);
  }

  void write_sparse(std::size_t count, int bits) {
    const std::size_t begin = out_.sparse.size();
    out_.sparse.resize(begin + sparse_bytes(count, bits));
    std::uint8_t* at = out_.sparse.data() + begin;
    if (bits == 8) {
      std::memcpy(at, fields_.data(), count);
      return;
    }
    for (int bit = 0; bit < bits; ++bit, at += (count + 7) / 8) {
      write_plane(fields_.data(), count, bit, at);
    }
  }

  const Code& code_;
  EncodedRows& out_;
  CodeMaps maps_;
  std::vector<std::uint8_t> fields_;
  std::vector<std::vector<std::uint8_t>> lists_;
  std::uint8_t pad_ = 0;
};

}  // namespace

EncodedRows encode_rows(const Code& code, const Geometry& geometry, const std::uint8_t* symbols) {
  EncodedRows out;
  BlockEncoder encoder(code, out);
  std::vector<std::uint8_t> block;
  for (std::size_t group = 0; group < geometry.row_groups(); ++group) {
    for (std::size_t part = 0; part < geometry.blocks_per_group(); ++part) {
      const std::size_t width = geometry.columns_in(part);
      const std::size_t begin = part * geometry.block_columns;
      const std::size_t filled = std::min(width, geometry.columns - begin);
      block.assign(geometry.rows_in(group) * width, encoder.pad());
      for (std::size_t row = 0; row < geometry.rows_in(group); ++row) {
        std::memcpy(block.data() + row * width,
                    symbols + (group * geometry.block_rows + row) * geometry.columns + begin,
                    filled);
      }
      encoder.encode(block.data(), block.size());
    }
  }
  return out;
}

}  // namespace entrollm
