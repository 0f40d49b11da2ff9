// Python bindings of what bench.kernels times: reading memory, the peak of the instructions, and
// linear layers whose weights come from memory. All timing loops are here and run on the core's
// own thread pool, so that a figure holds nothing of Python. The serving path does not come here.
#include <pybind11/pybind11.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/peak.h"
#include "isa.h"
#include "linear.h"
#include "memory.h"
#include "quantize.h"
#include "thread_pool.h"

namespace fulcrum {
namespace {

namespace py = pybind11;

constexpr int64_t kReadUnitBytes = 64 * 1024;
constexpr int64_t kPageBytes = 4096;
static_assert(kPageBytes % kReadMultiple == 0 && kReadUnitBytes % kPageBytes == 0);

void require(bool holds, const char* what) {
  if (!holds) throw py::value_error(what);
}

const char* checked_isa(const std::string& isa) {
  const LinearKernels* kernels = linear_kernels(isa.c_str());
  if (kernels == nullptr || !isa_supported(isa.c_str())) {
    throw py::value_error("instruction set " + isa + " is not available here");
  }
  return kernels->isa;
}

PeakLoops peak_loops(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return peak_loops_avx2();
  if (std::strcmp(isa, "avx512") == 0) return peak_loops_avx512();
  if (std::strcmp(isa, "avx512-bf16") == 0) return peak_loops_avx512_bf16();
  if (std::strcmp(isa, "amx") == 0) return peak_loops_amx();
#endif
  return peak_loops_portable();
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The core's pool with a job that changes from one measurement to the next.
class BenchPool final : private ThreadPool::Job {
 public:
  explicit BenchPool(int num_threads) : pool_(num_threads) {}

  int num_threads() const { return pool_.num_threads(); }

  // Runs job(thread) once on every thread, all of them from the same moment on.
  void run(const std::function<void(int)>& job) {
    std::atomic<int> num_arrived{0};
    job_ = [&](int thread) {
      num_arrived.fetch_add(1);
      while (num_arrived.load() < num_threads()) sched_yield();
      job(thread);
    };
    pool_.run(*this, {});
    pool_.wait_until_idle();
  }

  template <typename Op>
  void share(int thread, int num_units, Op op) {
    pool_.share(thread, num_units, op);
  }

 private:
  void run_thread(int thread, const ThreadPool::Arguments&) override { job_(thread); }

  std::function<void(int)> job_;
  ThreadPool pool_;
};

// Seconds that job(thread) takes, from the first thread's start to the last one's end. Every thread
// reads the clock, since on a busy machine one may lose its core right then, while others do its
// work.
template <typename Job>
double time_job(BenchPool& pool, Job job) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> starts(pool.num_threads()), ends(pool.num_threads());
  pool.run([&](int thread) {
    starts[thread] = Clock::now();
    job(thread);
    ends[thread] = Clock::now();
  });
  const auto start = *std::min_element(starts.begin(), starts.end());
  const auto end = *std::max_element(ends.begin(), ends.end());
  return std::chrono::duration<double>(end - start).count();
}

// Memory that is read again and again from its begin to its end.
struct Ring {
  const uint8_t* data;
  int64_t num_bytes;  // a multiple of kPageBytes
};

// Seconds to read num_bytes of the ring from `start` on, shared among the threads, with nothing to
// wait for in between.
double time_ring(BenchPool& pool, const PeakLoops& loops, const Ring& ring, int64_t start,
                 int64_t num_bytes) {
  const int num_units = static_cast<int>((num_bytes + kReadUnitBytes - 1) / kReadUnitBytes);
  return time_job(pool, [&](int thread) {
    pool.share(thread, num_units, [&](int first, int last) {
      int64_t from = start + first * kReadUnitBytes;
      const int64_t to = start + std::min(last * kReadUnitBytes, num_bytes);
      while (from < to) {
        const int64_t offset = from % ring.num_bytes;
        const int64_t length = std::min(to - from, ring.num_bytes - offset);
        const uint64_t sum = loops.read(ring.data + offset, length);
        asm volatile("" : : "r"(sum));
        from += length;
      }
    });
  });
}

// Seconds, and the operations that all threads together did in them.
std::pair<double, double> time_peak(const std::string& isa, const std::string& kind,
                                    BenchPool& pool, int64_t num_iterations) {
  const PeakLoops loops = peak_loops(checked_isa(isa));
  PeakLoop loop = loops.bf16;
  if (kind == "int8" || kind == "int4") {
    loop = kind == "int8" ? loops.int8 : loops.int4;
  } else {
    require(kind == "bf16", "kind must be int8, int4 or bf16");
  }
  std::vector<double> operations(pool.num_threads());
  const double seconds =
      time_job(pool, [&](int thread) { operations[thread] = loop(num_iterations); });
  double total = 0;
  for (const double part : operations) total += part;
  return {seconds, total};
}

class MemoryBench {
 public:
  MemoryBench(const std::string& isa, int64_t num_bytes)
      : loops_(peak_loops(checked_isa(isa))), memory_(round_up(num_bytes, kPageBytes)) {
    require(num_bytes > 0, "num_bytes must be positive");
    std::memset(memory_.data(), 1, memory_.bytes());  // untouched pages would all be one page
  }

  int64_t num_bytes() const { return static_cast<int64_t>(memory_.bytes()); }

  double time_read(BenchPool& pool, int num_calls) const {
    return time_ring(pool, loops_, {memory_.data(), num_bytes()}, 0, num_calls * num_bytes());
  }

 private:
  PeakLoops loops_;
  Buffer memory_;
};

int64_t packed_bytes(const std::string& isa, const std::string& format, int num_rows,
                     int num_cols) {
  require(num_rows > 0 && num_cols > 0, "num_rows and num_cols must be positive");
  return linear_kernels(checked_isa(isa))->packed_bytes(parse_format(format), num_rows, num_cols);
}

// Numbers without any order, the same in every run.
class Noise {
 public:
  uint32_t bits() { return state_ = state_ * 1664525u + 1013904223u; }
  float symmetric() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }

 private:
  uint32_t state_ = 1;
};

// Several equal matrices that take turns, so that by the time one comes again the caches have
// forgotten it, like a layer of a model; and activations that stay in the caches.
class LinearBench {
 public:
  LinearBench(const std::string& isa, const std::string& format, int num_rows, int num_cols,
              int num_matrices, int max_tokens)
      : kernels_(linear_kernels(checked_isa(isa))),
        loops_(peak_loops(kernels_->isa)),
        num_matrices_(num_matrices),
        max_tokens_(max_tokens) {
    packed_bytes_ = fulcrum::packed_bytes(isa, format, num_rows, num_cols);
    require(num_matrices > 0 && max_tokens > 0, "num_matrices and max_tokens must be positive");
    matrix_ = {parse_format(format), num_rows, num_cols, nullptr};
    stride_ = round_up(packed_bytes_, kPageBytes);
    memory_ = Buffer(stride_ * num_matrices);
    y_ = Buffer(sizeof(float) * num_rows * max_tokens);
    fill_weights();
    fill_activations();
  }

  // The next num_calls matrices times the first num_tokens rows, one after the other.
  double time_gemm(BenchPool& pool, int num_tokens, int num_calls) {
    require(num_tokens > 0 && num_tokens <= max_tokens_, "num_tokens out of range");
    const int channels = kernels_->tile_channels(matrix_.format);
    const int num_tiles = (matrix_.N + channels - 1) / channels;
    const double seconds = time_job(pool, [&](int thread) {
      for (int call = 0; call < num_calls; ++call) {
        PackedMatrix matrix = matrix_;
        matrix.data = next(call);
        pool.share(thread, num_tiles, [&](int begin, int end) {
          kernels_->gemm(matrix, activations_, num_tokens, y_.as<float>(), matrix.N, begin, end,
                         false);
        });
      }
    });
    next_ = (next_ + num_calls) % num_matrices_;
    return seconds;
  }

  // Reads the next num_calls matrices and does nothing else: what bounds time_gemm from below.
  double time_read(BenchPool& pool, int num_calls) {
    const double seconds = time_ring(pool, loops_, {memory_.data(), stride_ * num_matrices_},
                                     next_ * stride_, num_calls * stride_);
    next_ = (next_ + num_calls) % num_matrices_;
    return seconds * static_cast<double>(packed_bytes_) / static_cast<double>(stride_);
  }

 private:
  const uint8_t* next(int call) const {
    return memory_.data() + (next_ + call) % num_matrices_ * stride_;
  }

  // Every tile holds the same noise: the time does not depend on the values.
  void fill_weights() {
    const int N = matrix_.N, K = matrix_.K, unit = kernels_->tile_channels(matrix_.format);
    Noise noise;
    std::vector<float> values(size_t(unit) * K), scales(size_t(unit) * num_groups(K), 0x1p-7f),
        minima(scales.size(), -0x1p-4f);
    std::vector<uint8_t> quants(size_t(unit) * padded_k(K));
    const int quant_bits = format_info(matrix_.format).quant_bits;
    for (float& value : values) value = noise.symmetric();
    for (uint8_t& quant : quants)
      quant = static_cast<uint8_t>(noise.bits() >> 24 >> (8 - quant_bits));
    for (int row = 0; row < N; row += unit) {
      kernels_->pack(matrix_.format, N, K, row, std::min(row + unit, N), values.data(),
                     quants.data(), scales.data(), minima.data(), memory_.data());
    }
    for (int i = 1; i < num_matrices_; ++i) {
      std::memcpy(memory_.data() + i * stride_, memory_.data(), packed_bytes_);
    }
  }

  void fill_activations() {
    const int K = matrix_.K;
    const size_t groups = size_t(max_tokens_) * num_groups(K);
    Noise noise;
    values_.resize(size_t(max_tokens_) * K);
    quantized_.resize(groups * kGroupSize);
    scales_.resize(groups);
    sums_.resize(groups);
    totals_.resize(groups);
    for (float& value : values_) value = noise.symmetric();
    widened_.resize(quantized_.size());
    rounded_.resize(quantized_.size());
    activations_ = {values_.data(),    K,
                    quantized_.data(), widened_.data(),
                    scales_.data(),    sums_.data(),
                    totals_.data(),    rounded_.data()};
    kernels_->quantize_rows(activations_, K, 0, max_tokens_);
  }

  const LinearKernels* kernels_;
  PeakLoops loops_;
  int num_matrices_, max_tokens_;
  PackedMatrix matrix_;  // its data is one of the matrices in memory_
  int64_t packed_bytes_ = 0, stride_ = 0;
  Buffer memory_, y_;
  std::vector<float> values_, scales_, sums_, totals_;
  std::vector<int8_t> quantized_;
  std::vector<int16_t> widened_;
  std::vector<uint16_t> rounded_;
  Activations activations_;
  int64_t next_ = 0;  // the matrix whose turn it is
};

}  // namespace
}  // namespace fulcrum

void bind_bench(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace fulcrum;  // NOLINT: the anonymous names above
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  py::class_<BenchPool>(m, "ThreadPool")
      .def(py::init<int>(), py::arg("num_threads"))
      .def_property_readonly("num_threads", &BenchPool::num_threads);
  m.def("time_peak", &time_peak, py::arg("isa"), py::arg("kind"), py::arg("pool"),
        py::arg("num_iterations"), ReleaseGil());
  py::class_<MemoryBench>(m, "MemoryBench")
      .def(py::init<const std::string&, int64_t>(), py::arg("isa"), py::arg("num_bytes"))
      .def("time_read", &MemoryBench::time_read, py::arg("pool"), py::arg("num_calls"),
           ReleaseGil())
      .def_property_readonly("num_bytes", &MemoryBench::num_bytes);
  m.def("packed_bytes", &packed_bytes, py::arg("isa"), py::arg("format"), py::arg("num_rows"),
        py::arg("num_cols"));
  py::class_<LinearBench>(m, "LinearBench")
      .def(py::init<const std::string&, const std::string&, int, int, int, int>(), py::arg("isa"),
           py::arg("format"), py::arg("num_rows"), py::arg("num_cols"), py::arg("num_matrices"),
           py::arg("max_tokens"))
      .def("time_gemm", &LinearBench::time_gemm, py::arg("pool"), py::arg("num_tokens"),
           py::arg("num_calls"), ReleaseGil())
      .def("time_read", &LinearBench::time_read, py::arg("pool"), py::arg("num_calls"),
           ReleaseGil());
}
