// The scalar steps that the kernels of all instruction sets share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace entrollm {
namespace {  // every instruction set compiles its own

// The 64 bits at `p`, the first byte lowest.
inline std::uint64_t load_word(const std::uint8_t* p) {
  std::uint64_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// A word whose lowest `count` bits are set; all of them from 64 on.
inline std::uint64_t below(std::size_t count) {
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

}  // namespace
}  // namespace entrollm
