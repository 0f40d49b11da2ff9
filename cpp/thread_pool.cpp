#include "thread_pool.h"

#include <sched.h>

#include <algorithm>

namespace fulcrum {
namespace {

// Steps follow each other within tens of microseconds while requests run: a worker spins that
// long before it sleeps. Inside a job it yields after a shorter spin, since the thread that it
// waits for may need this very core.
constexpr int kSpinsBeforeSleep = 2000;
constexpr int kSpinsBeforeYield = 500;

// Between two offers of the core: shorter than the system lets a thread run before others get their
// turn, long enough that the calls cost little (0.2 % of the time at 0.4 us).
constexpr std::chrono::microseconds kOfferInterval{200};

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

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(std::max(1, num_threads)), places_(new Place[num_threads_]) {
  try {
    for (int thread = 1; thread < num_threads_; ++thread) {
      threads_.emplace_back([this, thread] { work(thread); });
    }
  } catch (...) {  // the system gives no more threads
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  is_stopping_.store(true);
  generation_.fetch_add(2);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(Job& job, const Arguments& arguments) {
  const uint32_t first_phase = open_phase();
  generation_.fetch_add(1);
  job_.store(&job);
  first_phase_.store(first_phase);
  for (size_t i = 0; i < arguments.size(); ++i) arguments_[i].store(arguments[i]);
  is_open_.store(true);
  generation_.fetch_add(1);
  if (num_sleeping_.load() > 0) generation_.notify_all();
  places_[0].phase = first_phase;
  job.run_thread(0, arguments);
  is_open_.store(false);
}

void ThreadPool::wait_until_idle() const {
  for (int thread = 1; thread < num_threads_; ++thread) {
    spin_until([&] { return !places_[thread].is_inside.load(); });
  }
}

void ThreadPool::wait_for_job(uint32_t seen) {
  for (int spins = 0; spins < kSpinsBeforeSleep; ++spins) {
    if (generation_.load() != seen) return;
    pause_cpu();
  }
  num_sleeping_.fetch_add(1);
  while (generation_.load() == seen) generation_.wait(seen);
  num_sleeping_.fetch_sub(1);
}

// Copies the job as of one generation, and returns which.
uint32_t ThreadPool::read_job(Job** job, uint32_t* first_phase, Arguments* arguments) const {
  while (true) {
    const uint32_t generation = generation_.load();
    *job = job_.load();
    *first_phase = first_phase_.load();
    for (size_t i = 0; i < arguments->size(); ++i) (*arguments)[i] = arguments_[i].load();
    if (generation % 2 == 0 && generation_.load() == generation) return generation;
    pause_cpu();
  }
}

void ThreadPool::work(int thread) {
  Place& place = places_[thread];
  uint32_t seen = 0;
  while (true) {
    wait_for_job(seen);
    if (is_stopping_.load()) return;
    // Inside first, then a look whether the job is still open: either wait_until_idle sees this
    // thread, or this thread sees that there is nothing left to do.
    place.is_inside.store(true);
    Job* job = nullptr;
    Arguments arguments;
    seen = read_job(&job, &place.phase, &arguments);
    if (is_open_.load()) job->run_thread(thread, arguments);
    place.is_inside.store(false);
  }
}

bool ThreadPool::take(uint32_t phase, int num_units, int* begin, int* end) {
  uint64_t queue = queue_.load(std::memory_order_acquire);
  int next = 0, count = 0;
  do {
    next = static_cast<int>(queue & 0xffffffff);
    if (queue >> 32 != phase || next >= num_units) return false;
    count = std::max(1, (num_units - next) / (2 * num_threads_));
  } while (!queue_.compare_exchange_weak(queue, queue + count, std::memory_order_acq_rel,
                                         std::memory_order_acquire));
  *begin = next;
  *end = next + count;
  return true;
}

void ThreadPool::complete(uint32_t phase, int num_units, int num_all_units) {
  const int completed = num_completed_.fetch_add(num_units, std::memory_order_acq_rel) + num_units;
  if (completed < num_all_units) return;
  // Nobody holds a unit of this phase any more, and none of the next can be taken yet.
  num_completed_.store(0, std::memory_order_relaxed);
  queue_.store(uint64_t{phase + 1} << 32, std::memory_order_release);
}

void ThreadPool::wait_for_end(uint32_t phase) const {
  spin_until([&] { return open_phase() != phase; });
}

// Lets others on this core run, which would otherwise do so in the middle of a unit, with all other
// threads waiting for its end. Where one has stayed for long, the thread keeps its core as long:
// who always yields gets little of a core that it shares with somebody who never does.
void ThreadPool::offer_core(int thread) {
  Clock::time_point& next_offer = places_[thread].next_offer;
  const Clock::time_point begin = Clock::now();
  if (begin < next_offer) return;
  sched_yield();
  const Clock::time_point end = Clock::now();
  next_offer = end + std::max<Clock::duration>(kOfferInterval, end - begin);
}

}  // namespace fulcrum
