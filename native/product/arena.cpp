#include "product/arena.hpp"

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstring>
#include <mutex>
#include <new>

namespace entrollm {
namespace {

constexpr std::size_t kLine = 64;

// Smaller arenas would waste most of a huge page, and share pages with others.
constexpr std::size_t kHugeFrom = std::size_t{4} << 20;
constexpr std::size_t kSharedBytes = std::size_t{16} << 20;

constexpr std::size_t whole_lines(std::size_t size) { return (size + kLine - 1) / kLine * kLine; }

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

void want_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t size) {
#ifdef MADV_HUGEPAGE
  if (size < kHugeFrom) return;
  const std::size_t page = page_bytes();
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), begin + size - first, MADV_HUGEPAGE);  // a wish
#endif
}

// Pages that small arenas have pieces of, until the last of them is gone.
class SharedPages {
 public:
  static std::shared_ptr<SharedPages> make() {
    void* map = map_pages(kSharedBytes);
    if (map == nullptr) throw std::bad_alloc();
    return std::shared_ptr<SharedPages>(new SharedPages(static_cast<std::uint8_t*>(map)));
  }
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;
  ~SharedPages() { unmap_pages(data_, kSharedBytes); }

  // Null when `size` bytes are not left, and a line behind them that a kernel may read.
  std::uint8_t* take(std::size_t size) {
    if (size + kLine > kSharedBytes - used_) return nullptr;
    std::uint8_t* piece = data_ + used_;
    used_ += whole_lines(size);
    return piece;
  }

 private:
  explicit SharedPages(std::uint8_t* data) : data_(data) {}

  std::uint8_t* const data_;
  std::size_t used_ = 0;
};

namespace {

struct Piece {
  std::shared_ptr<SharedPages> pages;
  std::uint8_t* data;
};

// `size` is below kHugeFrom.
Piece take_piece(std::size_t size) {
  // Never destroyed: threads may still load models while the process ends.
  static auto* mutex = new std::mutex;
  static auto* latest = new std::weak_ptr<SharedPages>;
  const std::lock_guard lock(*mutex);
  std::shared_ptr<SharedPages> pages = latest->lock();
  std::uint8_t* data = pages == nullptr ? nullptr : pages->take(size);
  if (data == nullptr) {
    pages = SharedPages::make();
    *latest = pages;
    data = pages->take(size);
  }
  return {std::move(pages), data};
}

}  // namespace

Arena::Arena(std::size_t capacity) : data_(nullptr), capacity_(capacity == 0 ? 1 : capacity) {
  data_ = static_cast<std::uint8_t*>(map_pages(capacity_));
  if (data_ == nullptr) throw std::bad_alloc();
}

Arena::~Arena() { release(); }

void Arena::release() {
  if (data_ != nullptr && shared_ == nullptr) unmap_pages(data_, capacity_);
}

std::uint8_t* Arena::allocate(std::size_t size) {
  const std::size_t rounded = whole_lines(size);
  if (rounded < size) return nullptr;
  std::size_t begin = used_;
  do {
    if (rounded > capacity_ - begin) return nullptr;
  } while (!used_.compare_exchange_weak(begin, begin + rounded));
  return data_ + begin;
}

void Arena::settle(ThreadPool& pool) {
  if (shared_ != nullptr) return;
  if (used_ >= kHugeFrom) return trim();
  pool.run(1, [&](std::size_t, std::size_t) {
    Piece piece = take_piece(used_);
    std::memcpy(piece.data, data_, used_);
    release();
    data_ = piece.data;
    capacity_ = used_;
    shared_ = std::move(piece.pages);
  });
}

void Arena::trim() {
  const std::size_t page = page_bytes();
  const std::size_t kept = (used_ + page - 1) / page * page;
  if (kept == 0 || kept >= capacity_) return;  // the last page stays mapped
  unmap_tail(data_ + kept, capacity_ - kept);
  capacity_ = kept;
}

}  // namespace entrollm
