// The threads of a model: they live as long as it does and run each step together, every thread
// the same code over its share of the work, with a barrier between operations.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace fulcrum {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();

  int num_threads() const { return num_threads_; }

  // Runs job(thread) on every thread, the caller's being thread 0; returns when all are done.
  // The job must not throw.
  void run(const std::function<void(int)>& job);

  // Inside a job: waits until every thread has come here, then opens the next queue of units.
  void barrier();

  // Inside a job, between two barriers: takes the next `count` units of `num_units`, in order.
  // Returns false when none is left. Threads that are slowed down by others on the machine take
  // fewer, so that all finish together.
  bool take(int num_units, int count, int* begin, int* end);

 private:
  void work(int thread);
  void wait_for_generation(uint32_t seen);

  const int num_threads_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};  // counts jobs
  alignas(64) std::atomic<int> num_sleeping_{0};
  alignas(64) std::atomic<int> num_unfinished_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> barrier_phase_{0};
  // Two queues in turn: while threads still leave one, the next is already at zero.
  struct alignas(64) Queue {
    std::atomic<int> next{0};
  };
  Queue queues_[2];
  std::atomic<bool> stopping_{false};
};

}  // namespace fulcrum
