#include "product/arena.hpp"

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <new>

namespace entrollm {
namespace {

constexpr std::size_t kLine = 64;

#ifdef _WIN32

std::size_t page_bytes() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
}

void* map_pages(std::size_t size) {
  return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_pages(void* map, std::size_t) { VirtualFree(map, 0, MEM_RELEASE); }

// The addresses stay reserved until the whole map is released.
void unmap_tail(void* tail, std::size_t size) { VirtualFree(tail, size, MEM_DECOMMIT); }

#else

// Smaller arenas gain nothing from huge pages, and would waste most of one.
constexpr std::size_t kHugeFrom = std::size_t{4} << 20;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

void* map_pages(std::size_t size) {
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  if (size >= kHugeFrom) madvise(map, size, MADV_HUGEPAGE);  // a wish: failure is fine
#endif
  return map;
}

void unmap_pages(void* map, std::size_t size) { munmap(map, size); }

void unmap_tail(void* tail, std::size_t size) { munmap(tail, size); }

#endif

}  // namespace

Arena::Arena(std::size_t capacity) : data_(nullptr), capacity_(capacity == 0 ? 1 : capacity) {
  data_ = static_cast<std::uint8_t*>(map_pages(capacity_));
  if (data_ == nullptr) throw std::bad_alloc();
}

Arena::~Arena() {
  if (data_ != nullptr) unmap_pages(data_, capacity_);
}

std::uint8_t* Arena::allocate(std::size_t size) {
  const std::size_t rounded = (size + kLine - 1) / kLine * kLine;
  if (rounded < size) return nullptr;
  std::size_t begin = used_;
  do {
    if (rounded > capacity_ - begin) return nullptr;
  } while (!used_.compare_exchange_weak(begin, begin + rounded));
  return data_ + begin;
}

void Arena::trim() {
  const std::size_t page = page_bytes();
  const std::size_t kept = (used_ + page - 1) / page * page;
  if (kept == 0 || kept >= capacity_) return;  // the last page stays mapped
  unmap_tail(data_ + kept, capacity_ - kept);
  capacity_ = kept;
}

}  // namespace entrollm
