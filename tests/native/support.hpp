// What the native tests share: checks that survive release builds, random codes, exact-size
// buffers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "format/code.hpp"
#include "kernels/kernels.hpp"

namespace entrollm::test {

using Bytes = std::vector<std::uint8_t>;

inline void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::abort();
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  // Uniform in [0, bound).
  std::size_t below(std::size_t bound) { return engine_() % bound; }
  std::uint8_t byte() { return static_cast<std::uint8_t>(engine_()); }
  bool coin() { return below(2) != 0; }

 private:
  std::mt19937_64 engine_;
};

// A copy whose allocation ends exactly `slack` bytes behind the data, for AddressSanitizer to
// guard.
class ExactBuffer {
 public:
  ExactBuffer(std::span<const std::uint8_t> data, std::size_t slack)
      : size_(data.size()), bytes_(new std::uint8_t[data.size() + slack]()) {
    if (size_ != 0) std::memcpy(bytes_.get(), data.data(), size_);
  }
  std::uint8_t* data() { return bytes_.get(); }
  std::size_t size() const { return size_; }
  std::span<const std::uint8_t> span() const { return {bytes_.get(), size_}; }

 private:
  std::size_t size_;
  std::unique_ptr<std::uint8_t[]> bytes_;
};

// The program of a random tree; `symbols` receives those that its fields name or its raw fields
// take.
inline void append_tree(Random& random, int depth, int low_bits, Bytes& program, Bytes& symbols) {
  const auto name_symbols = [&](std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      const auto symbol = static_cast<std::uint8_t>(random.byte() >> low_bits << low_bits);
      program.push_back(symbol);
      symbols.push_back(symbol);
    }
  };
  const std::size_t kind = random.below(depth == 0 ? 12 : depth < 6 ? 10 : 4);
  if (kind < 3) {
    const auto bits = static_cast<std::uint8_t>(1 + random.below(6));
    program.insert(program.end(), {1, bits, 0});
    name_symbols(std::size_t{1} << bits);
  } else if (kind == 3) {
    program.insert(program.end(), {1, 8, 0});
    for (int i = 0; i < 4; ++i) {
      symbols.push_back(static_cast<std::uint8_t>(random.byte() >> low_bits << low_bits));
    }
  } else if (kind < 8) {
    const auto bits = static_cast<std::uint8_t>(1 + random.below(6));
    program.insert(program.end(), {1, bits, 1});
    name_symbols((std::size_t{1} << bits) - 1);
    append_tree(random, depth + 1, low_bits, program, symbols);
  } else if (kind < 10) {
    program.push_back(2);
    append_tree(random, depth + 1, low_bits, program, symbols);
    append_tree(random, depth + 1, low_bits, program, symbols);
  } else {
    program.push_back(0);
    name_symbols(1);
  }
}

struct RandomCode {
  Bytes program;
  Bytes symbols;  // without low bits; repeated symbols are likelier
  int low_bits;

  explicit RandomCode(Random& random) : low_bits(static_cast<int>(random.below(7))) {
    append_tree(random, 0, low_bits, program, symbols);
  }
  Code code() const { return Code(program, low_bits); }
  std::uint8_t symbol(Random& random, std::size_t skew) const {
    std::size_t i = random.below(symbols.size());
    for (std::size_t n = 0; n < skew; ++n) i = std::min(i, random.below(symbols.size()));
    return static_cast<std::uint8_t>(symbols[i] | (random.byte() & ((1 << low_bits) - 1)));
  }
};

// Every set of kernels that this build has and this processor runs; scalar comes first.
inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const auto& [kernels, runs] : built_kernels()) {
    if (runs) {
      found.insert(found.begin(), kernels);
    } else {
      std::printf("%s: not on this processor\n", kernels->name);
    }
  }
  require(!found.empty() && std::string(found[0]->name) == "scalar", "the scalar kernels exist");
  return found;
}

}  // namespace entrollm::test
