// Loops on shared threads, for ThreadSanitizer: every task runs once, loops take turns, pools end.
#include <atomic>
#include <thread>

#include "codec/encode.hpp"
#include "product/matrix.hpp"
#include "product/product.hpp"
#include "support.hpp"
#include "threads/pool.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// Plain integers on purpose: an unordered access is a race that the sanitizer reports.
void check_loop(ThreadPool& pool, std::size_t tasks) {
  std::vector<int> runs(tasks, 0);
  std::vector<std::size_t> by_worker(pool.size(), 0);
  pool.run(tasks, [&](std::size_t task, std::size_t worker) {
    ++runs[task];
    ++by_worker[worker];
  });
  std::size_t total = 0;
  for (std::size_t count : by_worker) total += count;
  require(total == tasks, "every task is counted");
  for (int count : runs) require(count == 1, "every task runs once");
}

void check_turns(ThreadPool& pool) {
  std::vector<std::thread> callers;
  int inside = 0;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int loop = 0; loop < 50; ++loop) {
        pool.run(1, [&](std::size_t, std::size_t) {
          require(++inside == 1, "one loop at a time");
          --inside;
        });
        check_loop(pool, 7);
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

void check_sleepers() {
  ThreadPool pool(3);
  for (int loop = 0; loop < 20; ++loop) {
    std::this_thread::sleep_for(std::chrono::microseconds(loop * 50));  // around the time they spin
    check_loop(pool, 5);
  }
}

void check_products() {
  const Bytes program{1, 2, 0, 0, 1, 2, 3};
  const Geometry geometry{64, 256, 4, 256};
  const Code code(program, 0);
  const Bytes symbols(geometry.rows * geometry.columns, 2);
  EncodedRows rows = encode_rows(code, geometry, symbols.data());
  rows.dense.resize(stored_bytes(rows.dense.size()));
  const Bytes sparse(kSlack);
  const std::vector<float> scale{1.0f};
  const CodedMatrix matrix(code, geometry, rows.dense, sparse, {}, {scale, {}, {}});
  ThreadPool pool(4);
  const std::vector<float> x(3 * geometry.columns, 1.0f);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      std::vector<float> y(3 * geometry.rows);
      for (int loop = 0; loop < 20; ++loop) {
        const AnyMatrix matrices[] = {&matrix};
        multiply(pool, matrices, x.data(), 3, y.data());
        for (float value : y) require(value == 512.0f, "the product is exact");
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
  for (std::size_t threads : {0, 1, 2, 5}) {
    ThreadPool pool(threads);
    require(pool.size() == std::max<std::size_t>(1, threads), "the caller works too");
    for (std::size_t tasks : {0, 1, 2, 3, 100, 1000}) check_loop(pool, tasks);
    check_turns(pool);
  }
  for (int i = 0; i < 50; ++i) ThreadPool unused(4);
  ThreadPool sleepy(3, std::chrono::microseconds(0));
  for (int i = 0; i < 50; ++i) check_loop(sleepy, 5);
  check_sleepers();
  check_products();
  std::puts("pool: every task ran once");
}
