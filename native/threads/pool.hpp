// A fixed set of threads that share the iterations of one loop at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace entrollm {

// A process that is forked has a copy of the pool without its threads, which the next loop starts
// again. A fork waits for the loops that are running.
class ThreadPool {
 public:
  // The time for which workers look for the next loop before they sleep.
  static constexpr std::chrono::microseconds kSpin{200};

  // `threads` includes the calling thread, which works too.
  explicit ThreadPool(std::size_t threads, std::chrono::microseconds spin = kSpin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t size() const { return threads_; }

  // Calls body(task, worker) for every task below `tasks`, where worker is below size(). Returns
  // when all tasks are done. If one throws, those that have not begun are left out, and the first
  // exception is thrown here once no thread uses the body any more. Calls from several threads take
  // turns. Throws std::system_error if threads that a fork has ended cannot be started.
  void run(std::size_t tasks, const std::function<void(std::size_t, std::size_t)>& body);

 private:
  friend class ForkHandlers;

  void start();
  void work(std::size_t worker, std::uint64_t seen);
  void stop();
  void drain(std::size_t worker) noexcept;
  void forget_threads();

  const std::chrono::microseconds spin_;
  const std::size_t threads_;
  std::vector<std::thread> workers_;  // empty until start()
  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};  // counts the loops started
  std::atomic<bool> stop_{false};
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> busy_{0};
  std::size_t tasks_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // of the thread that set failed_
  const std::function<void(std::size_t, std::size_t)>* body_ = nullptr;
};

}  // namespace entrollm
