// Arenas keep their bytes when they settle, in pages of their own or in shared ones, whichever of
// their neighbours are gone.
#include <algorithm>
#include <memory>
#include <vector>

#include "product/arena.hpp"
#include "support.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

constexpr std::size_t kLarge = std::size_t{5} << 20;  // has pages of its own

struct Filled {
  Arena arena;
  std::uint8_t value;
  std::size_t size;

  Filled(ThreadPool& pool, std::size_t bytes, std::uint8_t filling)
      : arena(2 * bytes), value(filling), size(bytes) {
    std::uint8_t* first = arena.allocate(size);
    require(first != nullptr && first == arena.data(), "the first piece is where data() is");
    std::fill_n(first, size, value);
    arena.settle(pool);
  }

  bool is_intact() const {
    const std::uint8_t* data = arena.data();
    return std::all_of(data, data + size, [&](std::uint8_t byte) { return byte == value; });
  }
};

void check_neighbours(ThreadPool& pool) {
  Random random(1);
  std::vector<std::unique_ptr<Filled>> all;
  // More than shared pages have room for, so that there are several.
  for (std::size_t i = 0; i < 24; ++i) {
    const std::size_t size = i % 8 == 7 ? kLarge : 1 + random.below(3u << 20);
    all.push_back(std::make_unique<Filled>(pool, size, static_cast<std::uint8_t>(i + 1)));
  }
  while (!all.empty()) {
    for (const auto& filled : all) require(filled->is_intact(), "bytes stay as they were");
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(random.below(all.size())));
  }
}

void check_limits(ThreadPool& pool) {
  Arena arena(100);
  require(arena.allocate(101) == nullptr, "the capacity is the limit");
  require(arena.allocate(SIZE_MAX) == nullptr, "also where rounding overflows");
  require(arena.used() == 0, "what does not fit is not used");
  arena.settle(pool);
  arena.settle(pool);
  Arena moved(std::move(arena));
  require(moved.used() == 0, "an empty arena settles");
}

}  // namespace

int main() {
  ThreadPool pool(2);
  check_neighbours(pool);
  check_limits(pool);
}
