// Buffers between two inaccessible pages: a kernel that leaves its buffer by one byte faults, in
// release builds and under emulators too.
#pragma once

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "support.hpp"

namespace entrollm::test {

#ifdef _WIN32

inline std::size_t page_bytes() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
}

inline void* map_inaccessible(std::size_t size) {
  return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_NOACCESS);
}

inline bool make_accessible(void* begin, std::size_t size) {
  DWORD before;
  return VirtualProtect(begin, size, PAGE_READWRITE, &before) != 0;
}

inline void unmap(void* map, std::size_t) { VirtualFree(map, 0, MEM_RELEASE); }

#else

inline std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

inline void* map_inaccessible(std::size_t size) {
  void* map = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return map == MAP_FAILED ? nullptr : map;
}

inline bool make_accessible(void* begin, std::size_t size) {
  return mprotect(begin, size, PROT_READ | PROT_WRITE) == 0;
}

inline void unmap(void* map, std::size_t size) { munmap(map, size); }

#endif

class Guarded {
 public:
  // `size` bytes that end at the page behind them, or that start at the page before them.
  Guarded(std::size_t size, bool at_end) : size_(size) {
    const std::size_t page = page_bytes();
    const std::size_t inner = (size + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    map_ = static_cast<std::uint8_t*>(map_inaccessible(mapped_));
    require(map_ != nullptr, "address space for a test buffer");
    require(inner == 0 || make_accessible(map_ + page, inner), "memory for a test buffer");
    data_ = map_ + page + (at_end ? inner - size : 0);
  }
  ~Guarded() { unmap(map_, mapped_); }
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
