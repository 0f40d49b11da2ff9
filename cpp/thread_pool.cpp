#include "thread_pool.h"

#include <sched.h>

#include <algorithm>

namespace fulcrum {
namespace {

// Steps follow each other within tens of microseconds while requests run: a worker spins that
// long before it sleeps. In a barrier it yields after a shorter spin, since the thread that it
// waits for may need this very core.
constexpr int kSpinsBeforeSleep = 2000;
constexpr int kSpinsBeforeYield = 500;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Done>
void spin_until(Done done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause_cpu();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {
  for (int thread = 1; thread < num_threads_; ++thread) {
    threads_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(int)>& job) {
  job_ = &job;
  queues_[0].next.store(0, std::memory_order_relaxed);
  queues_[1].next.store(0, std::memory_order_relaxed);
  num_unfinished_.store(num_threads_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1);
  if (num_sleeping_.load() > 0) generation_.notify_all();
  job(0);
  spin_until([this] { return num_unfinished_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::wait_for_generation(uint32_t seen) {
  for (int spins = 0; spins < kSpinsBeforeSleep; ++spins) {
    if (generation_.load(std::memory_order_acquire) != seen) return;
    pause_cpu();
  }
  num_sleeping_.fetch_add(1);
  while (generation_.load() == seen) generation_.wait(seen);
  num_sleeping_.fetch_sub(1);
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_generation(seen);
    ++seen;
    if (stopping_.load()) return;
    (*job_)(thread);
    num_unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::barrier() {
  const uint32_t phase = barrier_phase_.load(std::memory_order_relaxed);
  if (num_threads_ == 1) {
    queues_[phase & 1].next.store(0, std::memory_order_relaxed);
    barrier_phase_.store(phase + 1, std::memory_order_relaxed);
    return;
  }
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    num_arrived_.store(0, std::memory_order_relaxed);
    // Everybody has left the queue of this phase; it serves again in the phase after the next.
    queues_[phase & 1].next.store(0, std::memory_order_relaxed);
    barrier_phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return barrier_phase_.load(std::memory_order_acquire) != phase; });
}

bool ThreadPool::take(int num_units, int count, int* begin, int* end) {
  Queue& queue = queues_[barrier_phase_.load(std::memory_order_relaxed) & 1];
  *begin = queue.next.fetch_add(count, std::memory_order_relaxed);
  *end = std::min(*begin + count, num_units);
  return *begin < num_units;
}

}  // namespace fulcrum
