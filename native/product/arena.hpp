// Memory that is reserved once and handed out in pieces by several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace entrollm {

// Pages are the system's until they are written, and huge ones where it grants them.
class Arena {
 public:
  // Reserves addresses for `capacity` bytes; throws std::bad_alloc.
  explicit Arena(std::size_t capacity);
  ~Arena();
  Arena(Arena&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        capacity_(std::exchange(other.capacity_, 0)),
        used_(other.used_.load()) {}
  Arena& operator=(Arena&&) = delete;

  // `size` bytes of zeros that begin a cache line; null when the capacity does not suffice.
  std::uint8_t* allocate(std::size_t size);

  // Returns the pages behind what was allocated to the system.
  void trim();

  std::size_t used() const { return used_; }

 private:
  std::uint8_t* data_;
  std::size_t capacity_;
  std::atomic<std::size_t> used_{0};
};

}  // namespace entrollm
