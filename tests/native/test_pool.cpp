// Loops on shared threads, for ThreadSanitizer: every task runs once, loops take turns, pools end.
// And pools in forked processes, and tasks that throw.
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

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

// Every task that throws ends its loop with its exception, after which no thread uses the body.
void check_exceptions(ThreadPool& pool) {
  for (std::size_t tasks : {1, 2, 7, 100}) {
    for (std::size_t bad = 0; bad < tasks; bad += 1 + tasks / 9) {
      std::atomic<std::size_t> inside{0};
      try {
        pool.run(tasks, [&](std::size_t task, std::size_t) {
          ++inside;
          if (task == bad) {
            --inside;
            throw std::runtime_error(std::to_string(task));
          }
          std::this_thread::yield();
          --inside;
        });
        require(false, "the exception is passed on");
      } catch (const std::runtime_error& error) {
        require(error.what() == std::to_string(bad), "it is the one that was thrown");
      }
      require(inside == 0, "no task is running any more");
      check_loop(pool, tasks);
    }
  }
  try {
    pool.run(50, [](std::size_t, std::size_t) { throw std::bad_alloc(); });
    require(false, "one of several exceptions is passed on");
  } catch (const std::bad_alloc&) {
  }
  check_loop(pool, 50);
}

#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)

// Runs `body` in a forked process, which must end by itself.
template <class Body>
void in_child(const Body& body) {
  const pid_t child = fork();
  require(child >= 0, "the process can fork");
  if (child == 0) {
    alarm(60);
    body();
    _exit(0);
  }
  int status = 0;
  require(waitpid(child, &status, 0) == child, "the child ends");
  require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child has run its loops");
}

void check_forks() {
  for (int loop = 0; loop < 20; ++loop) {
    auto pool = std::make_unique<ThreadPool>(4);
    if (loop % 2 == 0) check_loop(*pool, 9);  // else they may not have begun to wait
    std::this_thread::sleep_for(std::chrono::microseconds(loop * 30));
    in_child([&] {
      check_loop(*pool, 9);
      in_child([&] { check_loop(*pool, 9); });
      check_exceptions(*pool);
      pool.reset();
    });
    in_child([&] { pool.reset(); });
    check_loop(*pool, 9);
  }
}

// A fork waits for the loops of other threads.
void check_forks_among_loops() {
  ThreadPool pool(3), other(2);
  std::atomic<bool> done{false};
  std::thread caller([&] {
    while (!done) check_loop(pool, 20);
  });
  for (int loop = 0; loop < 20; ++loop) {
    in_child([&] {
      check_loop(pool, 20);
      check_loop(other, 20);
    });
  }
  done = true;
  caller.join();
}

#else

// ThreadSanitizer starts no threads in a forked process.
void check_forks() {}
void check_forks_among_loops() {}

#endif

}  // namespace

int main() {
  for (std::size_t threads : {0, 1, 2, 5}) {
    ThreadPool pool(threads);
    require(pool.size() == std::max<std::size_t>(1, threads), "the caller works too");
    for (std::size_t tasks : {0, 1, 2, 3, 100, 1000}) check_loop(pool, tasks);
    check_turns(pool);
    check_exceptions(pool);
  }
  for (int i = 0; i < 50; ++i) ThreadPool unused(4);
  ThreadPool sleepy(3, std::chrono::microseconds(0));
  for (int i = 0; i < 50; ++i) check_loop(sleepy, 5);
  check_sleepers();
  check_products();
  check_forks();
  check_forks_among_loops();
  std::puts("pool: every task ran once");
}
