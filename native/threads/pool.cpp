#include "threads/pool.hpp"

#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <new>
#include <utility>

namespace entrollm {
namespace {

// A waiting thread looks this often before it lets other threads use its core.
constexpr int kPatience = 2000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_a_little(int looks) {
  if (looks < kPatience) {
    relax();
  } else {
    std::this_thread::yield();
  }
}

}  // namespace

#ifdef _WIN32

class ForkHandlers {
 public:
  static void add(ThreadPool*) {}
  static void remove(ThreadPool*) {}
};

#else

// Knows all pools, and prepares them for a fork. The thread that forks takes every pool's turn, so
// that no loop is half done in the child.
class ForkHandlers {
 public:
  static void add(ThreadPool* pool) {
    static const int registered = pthread_atfork(before, after_in_parent, after_in_child);
    if (registered != 0) throw std::bad_alloc();
    const std::lock_guard lock(mutex());
    pools().push_back(pool);
  }

  static void remove(ThreadPool* pool) {
    const std::lock_guard lock(mutex());
    std::erase(pools(), pool);
  }

 private:
  // Never destroyed: a process may fork while it ends.
  static std::mutex& mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<ThreadPool*>& pools() {
    static auto* pools = new std::vector<ThreadPool*>;
    return *pools;
  }

  static void before() {
    mutex().lock();
    for (ThreadPool* pool : pools()) pool->turn_.lock();
  }
  static void after_in_parent() {
    for (ThreadPool* pool : pools()) pool->turn_.unlock();
    mutex().unlock();
  }
  static void after_in_child() {
    for (ThreadPool* pool : pools()) pool->forget_threads();
    after_in_parent();
  }
};

#endif

ThreadPool::ThreadPool(std::size_t threads, std::chrono::microseconds spin)
    : spin_(spin), threads_(std::max<std::size_t>(1, threads)) {
  start();
  try {
    ForkHandlers::add(this);
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  ForkHandlers::remove(this);
  stop();
}

void ThreadPool::start() {
  // Nothing starts a loop now, so all workers wait for the same one.
  const std::uint64_t seen = generation_.load();
  try {
    workers_.reserve(threads_ - 1);
    for (std::size_t worker = 1; worker < threads_; ++worker) {
      workers_.emplace_back([this, worker, seen] { work(worker, seen); });
    }
  } catch (...) {
    // The system has no more threads. Those that have started must end before the error is passed
    // on.
    stop();
    stop_ = false;
    throw;
  }
}

void ThreadPool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

// In a forked process, the threads are gone and can have left the mutex locked and waiters behind.
// Destroying any of these would wait for them, so their memory is taken over or lost.
void ThreadPool::forget_threads() {
  new (&workers_) std::vector<std::thread>;
  new (&mutex_) std::mutex;
  new (&wake_) std::condition_variable;
}

void ThreadPool::run(std::size_t tasks, const std::function<void(std::size_t, std::size_t)>& body) {
  const std::lock_guard turn(turn_);
  if (threads_ == 1 || tasks == 1) {
    for (std::size_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  if (workers_.empty()) start();
  body_ = &body;
  tasks_ = tasks;
  next_ = 0;
  failed_ = false;
  busy_ = workers_.size();
  {
    const std::lock_guard lock(mutex_);
    ++generation_;
  }
  wake_.notify_all();
  drain(0);
  // The last tasks end within microseconds, unless other programs use their cores. Those should
  // run.
  for (int looks = 0; busy_.load() != 0; ++looks) wait_a_little(looks);
  if (failed_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::drain(std::size_t worker) noexcept {
  for (std::size_t task = next_++; task < tasks_ && !failed_; task = next_++) {
    try {
      (*body_)(task, worker);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
      return;
    }
  }
}

void ThreadPool::work(std::size_t worker, std::uint64_t seen) {
  while (true) {
    // Products of one token follow each other within microseconds. Waking a worker that sleeps in
    // between would take longer than the product.
    const auto deadline = std::chrono::steady_clock::now() + spin_;
    for (int looks = 0; generation_.load() == seen && std::chrono::steady_clock::now() < deadline;
         ++looks) {
      wait_a_little(looks);
    }
    if (generation_.load() == seen) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
    }
    seen = generation_.load();
    if (stop_) return;
    drain(worker);
    --busy_;
  }
}

}  // namespace entrollm
