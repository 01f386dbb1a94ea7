// A fixed set of threads that share the iterations of one loop at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace entrollm {

class ThreadPool {
 public:
  // The time for which workers look for the next loop before they sleep.
  static constexpr std::chrono::microseconds kSpin{200};

  // `threads` includes the calling thread, which works too.
  explicit ThreadPool(std::size_t threads, std::chrono::microseconds spin = kSpin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t size() const { return workers_.size() + 1; }

  // Calls body(task, worker) for every task below `tasks`, where worker is below size(). Returns
  // when all tasks are done. The body must not throw. Calls from several threads take turns.
  void run(std::size_t tasks, const std::function<void(std::size_t, std::size_t)>& body);

 private:
  void work(std::size_t worker);
  void stop();
  void drain(std::size_t worker);

  const std::chrono::microseconds spin_;
  std::vector<std::thread> workers_;
  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};  // counts the loops started
  std::atomic<bool> stop_{false};
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> busy_{0};
  std::size_t tasks_ = 0;
  const std::function<void(std::size_t, std::size_t)>* body_ = nullptr;
};

}  // namespace entrollm
