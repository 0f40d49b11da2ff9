// The threads of a model, and of the models that draft for it: they live as long as these do and
// run each step together, every thread the same code. An operation is over when all of its units
// are computed, not when all threads have come by: a thread that the machine gave to somebody else
// holds up at most the units it has taken, and skips what the others did without it. And it offers
// its core now and then while it has taken none, before it is made to leave it while it has.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace fulcrum {

class ThreadPool {
 public:
  using Arguments = std::array<int, 6>;

  // What the threads run together. It must not throw, must call share() equally often on every
  // thread, with equal numbers of units, and may write shared memory inside of share() only.
  class Job {
   public:
    virtual void run_thread(int thread, const Arguments& arguments) = 0;

   protected:
    ~Job() = default;
  };

  explicit ThreadPool(int num_threads);
  ~ThreadPool();

  int num_threads() const { return num_threads_; }

  // Runs the job on every thread, the caller's being thread 0; returns when its last operation is
  // over. Other threads may then still be on their way through it. One caller at a time.
  void run(Job& job, const Arguments& arguments);

  // Waits until no other thread is inside a job: before one, or memory that it reads, goes.
  void wait_until_idle() const;

  // Inside a job: calls op(begin, end) on parts of `num_units` (at least 1) units, shared among
  // the threads; returns when all units are computed. The first parts are large, so that a thread
  // reads long runs of memory, the last ones small, so that all threads finish together though
  // others on the machine slow one of them down (guided self-scheduling: Polychronopoulos & Kuck
  // 1987).
  template <typename Op>
  void share(int thread, int num_units, Op op) {
    const uint32_t phase = places_[thread].phase++;
    int begin, end;
    while (take(phase, num_units, &begin, &end)) {
      op(begin, end);
      complete(phase, end - begin, num_units);
      offer_core(thread);
    }
    wait_for_end(phase);
  }

  // Inside a job: whether the next operation is still to be computed. A thread that lags behind
  // need not prepare for it otherwise.
  bool is_next_open(int thread) const { return open_phase() == places_[thread].phase; }

 private:
  using Clock = std::chrono::steady_clock;

  // What a thread has to itself: all but is_inside is for no other one.
  struct alignas(64) Place {
    uint32_t phase = 0;  // of the next operation
    Clock::time_point next_offer;
    std::atomic<bool> is_inside{false};  // the job
  };

  bool take(uint32_t phase, int num_units, int* begin, int* end);
  void complete(uint32_t phase, int num_units, int num_all_units);
  void wait_for_end(uint32_t phase) const;
  void offer_core(int thread);
  uint32_t open_phase() const {
    return static_cast<uint32_t>(queue_.load(std::memory_order_acquire) >> 32);
  }
  void stop();
  void work(int thread);
  void wait_for_job(uint32_t seen);
  uint32_t read_job(Job** job, uint32_t* first_phase, Arguments* arguments) const;

  const int num_threads_;
  std::unique_ptr<Place[]> places_;  // (num_threads,)
  std::vector<std::thread> threads_;
  // The open operation's phase in the upper half, its next unit in the lower: taken together, so
  // that a thread that lags cannot take a unit of a later operation.
  alignas(64) std::atomic<uint64_t> queue_{0};
  alignas(64) std::atomic<int> num_completed_{0};
  // The job, guarded by its generation as a sequence lock: odd while it is written.
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<Job*> job_{nullptr};
  std::atomic<uint32_t> first_phase_{0};
  std::array<std::atomic<int>, std::tuple_size_v<Arguments>> arguments_{};
  std::atomic<bool> is_open_{false};  // false once the job's last operation is over
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_stopping_{false};
};

}  // namespace fulcrum
