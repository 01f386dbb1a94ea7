// Memory that is reserved once and handed out in pieces by several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "threads/pool.hpp"

namespace entrollm {

// Asks the system for huge pages where `size` bytes that nobody has written yet are many.
void want_huge_pages(void* memory, std::size_t size);

class SharedPages;

// Pages are the system's until they are written, and huge ones where it grants them.
class Arena {
 public:
  // Reserves addresses for `capacity` bytes; throws std::bad_alloc.
  explicit Arena(std::size_t capacity);
  ~Arena();
  Arena(Arena&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        capacity_(std::exchange(other.capacity_, 0)),
        used_(other.used_.load()),
        shared_(std::move(other.shared_)) {}
  Arena& operator=(Arena&&) = delete;

  // `size` bytes of zeros that begin a cache line; null when the capacity does not suffice.
  std::uint8_t* allocate(std::size_t size);

  // Ends allocation: returns the pages behind what was allocated to the system. What is too small
  // for huge pages of its own moves to pages that it shares with other arenas, and data() with it.
  // That happens in a turn of `pool`, so that no fork comes in between. Throws std::bad_alloc, and
  // nothing has moved then.
  void settle(ThreadPool& pool);

  // What was allocated first.
  std::uint8_t* data() const { return data_; }
  std::size_t used() const { return used_; }

 private:
  void trim();
  void release();

  std::uint8_t* data_;
  std::size_t capacity_;
  std::atomic<std::size_t> used_{0};
  std::shared_ptr<SharedPages> shared_;  // that the bytes are in; null if they have their own
};

}  // namespace entrollm
