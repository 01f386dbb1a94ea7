// Buffers between two inaccessible pages: a kernel that leaves its buffer by one byte faults, in
// release builds and under emulators too.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include "support.hpp"

namespace entrollm::test {

class Guarded {
 public:
  // `size` bytes that end at the page behind them, or that start at the page before them.
  Guarded(std::size_t size, bool at_end) : size_(size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inner = (size + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    void* map = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(map != MAP_FAILED, "address space for a test buffer");
    map_ = static_cast<std::uint8_t*>(map);
    require(inner == 0 || mprotect(map_ + page, inner, PROT_READ | PROT_WRITE) == 0,
            "memory for a test buffer");
    data_ = map_ + page + (at_end ? inner - size : 0);
  }
  ~Guarded() { munmap(map_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::uint8_t* data() { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_;
  std::size_t mapped_;
  std::uint8_t* map_;
  std::uint8_t* data_;
};

}  // namespace entrollm::test
