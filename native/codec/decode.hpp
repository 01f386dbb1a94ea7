// Decodes one block: first the sparse lists, the lowest first, then the root's dense fields.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "codec/trellis.hpp"
#include "format/code.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {

enum class BlockStatus { kOk, kCorrupt };

// Buffers of one thread. They are sized for the worst block of a code, so that no kernel can leave
// them, whatever the stream contains.
class DecodeScratch {
 public:
  // Grows the buffers to the size that blocks of up to `max_block` symbols of `code` need.
  void reserve(const Code& code, std::size_t max_block);

  std::uint8_t* block() { return memory_.get(); }  // decoded symbols, max_block + slack bytes
  std::uint8_t* lists() { return memory_.get() + list_begin_; }
  std::vector<std::uint32_t>& counts() { return counts_; }
  std::vector<const std::uint8_t*>& outputs() { return outputs_; }
  std::vector<std::uint32_t>& stream_offsets() { return stream_offsets_; }
  std::vector<TrellisState>& trellis() { return trellis_; }  // of the rows of a row block

 private:
  struct Free {
    void operator()(std::uint8_t* p) const;
  };
  std::size_t list_begin_ = 0;
  std::size_t size_ = 0;
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::vector<std::uint32_t> counts_;
  std::vector<std::uint32_t> stream_offsets_;
  std::vector<const std::uint8_t*> outputs_;
  std::vector<TrellisState> trellis_;
};

// The calling thread's buffers, kept between products.
DecodeScratch& thread_scratch(const Code& code, std::size_t max_block);

// Decodes `count` symbols (a multiple of kVector, at most the scratch's max_block) into
// scratch.block(). `dense` holds code.dense_size(count) bytes and `sparse` the block's sparse part;
// kSlack readable bytes follow both.
BlockStatus decode_block(const Kernels& kernels, const Code& code, const std::uint8_t* dense,
                         std::span<const std::uint8_t> sparse, std::size_t count,
                         DecodeScratch& scratch);

}  // namespace entrollm
