#include "threads/pool.hpp"

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

ThreadPool::ThreadPool(std::size_t threads, std::chrono::microseconds spin) : spin_(spin) {
  try {
    for (std::size_t worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { work(worker); });
    }
  } catch (...) {
    // The system has no more threads. Those that have started must end before the error is passed
    // on.
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(std::size_t tasks, const std::function<void(std::size_t, std::size_t)>& body) {
  const std::lock_guard turn(turn_);
  if (workers_.empty() || tasks == 1) {
    for (std::size_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  body_ = &body;
  tasks_ = tasks;
  next_ = 0;
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
}

void ThreadPool::drain(std::size_t worker) {
  for (std::size_t task = next_++; task < tasks_; task = next_++) (*body_)(task, worker);
}

void ThreadPool::work(std::size_t worker) {
  std::uint64_t seen = 0;
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
