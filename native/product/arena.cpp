#include "product/arena.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace entrollm {
namespace {

constexpr std::size_t kLine = 64;

// Smaller arenas gain nothing from huge pages, and would waste most of one.
constexpr std::size_t kHugeFrom = std::size_t{4} << 20;

}  // namespace

Arena::Arena(std::size_t capacity) : data_(nullptr), capacity_(capacity == 0 ? 1 : capacity) {
  void* map = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::uint8_t*>(map);
#ifdef MADV_HUGEPAGE
  if (capacity_ >= kHugeFrom) madvise(map, capacity_, MADV_HUGEPAGE);  // a wish: failure is fine
#endif
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, capacity_);
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
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t kept = (used_ + page - 1) / page * page;
  if (kept == 0 || kept >= capacity_) return;  // the last page stays mapped
  munmap(data_ + kept, capacity_ - kept);
  capacity_ = kept;
}

}  // namespace entrollm
