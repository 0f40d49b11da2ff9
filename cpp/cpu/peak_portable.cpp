// Peak of the portable kernels: the loops of peak.h in plain C++, over operands in the L1 cache, as
// the compiler vectorises them for the architecture's baseline. A limit for the code, not for the
// machine. The empty asm statements make the compiler load the operands anew.
#include <cstring>

#include "cpu/peak.h"
#include "linear.h"

namespace fulcrum {
namespace {

double run_bytes(int64_t num_iterations) {
  int8_t weights[kGroupSize], activations[kGroupSize];
  std::memset(weights, 5, sizeof(weights));
  std::memset(activations, -3, sizeof(activations));
  uint32_t sum = 0;  // may wrap
  for (int64_t i = 0; i < num_iterations; ++i) {
    asm volatile("" : : "r"(weights), "r"(activations) : "memory");
    int dot = 0;
    for (int k = 0; k < kGroupSize; ++k) dot += weights[k] * activations[k];
    sum += static_cast<uint32_t>(dot);
  }
  asm volatile("" : : "r"(sum));
  return 2.0 * kGroupSize * static_cast<double>(num_iterations);
}

double run_float32(int64_t num_iterations) {
  constexpr int kChains = 32;
  float weights[kChains], sums[kChains] = {};
  for (float& weight : weights) weight = 0.25f;
  for (int64_t i = 0; i < num_iterations; ++i) {
    asm volatile("" : : "r"(weights) : "memory");
    for (int chain = 0; chain < kChains; ++chain) sums[chain] += weights[chain] * 0.5f;
  }
  asm volatile("" : : "r"(sums) : "memory");
  return 2.0 * kChains * static_cast<double>(num_iterations);
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
  constexpr int kWords = 16;
  const int64_t part_bytes = num_bytes / kReadParts;
  uint64_t sums[kWords] = {};
  for (int64_t offset = 0; offset < part_bytes; offset += kWords * 8) {
    for (int part = 0; part < kReadParts; ++part) {
      uint64_t words[kWords];
      std::memcpy(words, data + part * part_bytes + offset, sizeof(words));
      for (int i = 0; i < kWords; ++i) sums[i] ^= words[i];
    }
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum ^= part;
  return sum;
}

}  // namespace

PeakLoops peak_loops_portable() { return {run_bytes, run_bytes, run_float32, read}; }

}  // namespace fulcrum
