// Decodes one arbitrary block with every set of kernels: all must agree, none may leave its
// buffers.
#pragma once

#include "codec/decode.hpp"
#include "support.hpp"

namespace entrollm::test {

// `dense` has code.dense_size(count) bytes. Returns the status and fills `out` when it is kOk.
inline BlockStatus decode_everywhere(const std::vector<const Kernels*>& kernels, const Code& code,
                                     std::span<const std::uint8_t> dense,
                                     std::span<const std::uint8_t> sparse, std::size_t count,
                                     Bytes& out) {
  require(dense.size() == code.dense_size(count), "the caller sized the dense part");
  ExactBuffer dense_copy(dense, kSlack);
  ExactBuffer sparse_copy(sparse, kSlack);
  BlockStatus expected = BlockStatus::kOk;
  for (const Kernels* isa : kernels) {
    DecodeScratch scratch;
    scratch.reserve(code, count);
    const BlockStatus status =
        decode_block(*isa, code, dense_copy.data(), sparse_copy.span(), count, scratch);
    if (isa == kernels.front()) {
      expected = status;
      if (status == BlockStatus::kOk) out.assign(scratch.block(), scratch.block() + count);
      continue;
    }
    require(status == expected, std::string(isa->name) + " agrees with scalar about the status");
    require(status != BlockStatus::kOk || std::memcmp(out.data(), scratch.block(), count) == 0,
            std::string(isa->name) + " agrees with scalar about the symbols");
  }
  return expected;
}

}  // namespace entrollm::test
