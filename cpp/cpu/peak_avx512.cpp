// Peak of x86-64 with AVX-512 and VNNI: the loops of peak.h over the instructions of
// linear_avx512.cpp. Compiled with ISA flags, so everything but the entry point is local to the
// file. The empty asm statements are explained in peak_avx2.cpp.
#include <immintrin.h>

#include "cpu/peak.h"

namespace fulcrum {
namespace {

constexpr int kChains = 16;  // two units with a latency of up to five cycles need ten
constexpr double kByteProducts = 64;
constexpr double kFloatProducts = 16;

// vpdpbusd; 4-bit weights gain nothing here once they are unpacked.
double run_bytes(int64_t num_iterations) {
  const __m512i activations = _mm512_set1_epi8(-3);
  __m512i weights = _mm512_set1_epi8(5);
  __m512i sums[kChains];
#pragma GCC unroll 16
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_setzero_si512();
  for (int64_t i = 0; i < num_iterations; ++i) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      asm volatile("" : "+v"(weights));
      sums[chain] = _mm512_dpbusd_epi32(sums[chain], weights, activations);
      asm volatile("" : "+v"(sums[chain]));
    }
  }
  return 2 * kByteProducts * kChains * static_cast<double>(num_iterations);
}

double run_float32(int64_t num_iterations) {
  const __m512 activations = _mm512_set1_ps(0.5f);
  __m512 weights = _mm512_set1_ps(0.25f);
  __m512 sums[kChains];
#pragma GCC unroll 16
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_setzero_ps();
  for (int64_t i = 0; i < num_iterations; ++i) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      asm volatile("" : "+v"(weights));
      sums[chain] = _mm512_fmadd_ps(weights, activations, sums[chain]);
      asm volatile("" : "+v"(sums[chain]));
    }
  }
  return 2 * kFloatProducts * kChains * static_cast<double>(num_iterations);
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
  constexpr int kLoads = 4;
  const int64_t part_bytes = num_bytes / kReadParts;
  __m512i sums[kLoads];
#pragma GCC unroll 8
  for (int i = 0; i < kLoads; ++i) sums[i] = _mm512_setzero_si512();
  for (int64_t offset = 0; offset < part_bytes; offset += kLoads * 64) {
#pragma GCC unroll 4
    for (int part = 0; part < kReadParts; ++part) {
      const uint8_t* at = data + part * part_bytes + offset;
#pragma GCC unroll 4
      for (int i = 0; i < kLoads; ++i) {
        sums[i] = _mm512_xor_si512(sums[i], _mm512_load_si512(at + i * 64));
      }
    }
  }
  for (int i = 1; i < kLoads; ++i) sums[0] = _mm512_xor_si512(sums[0], sums[i]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[0]));
}

}  // namespace

PeakLoops peak_loops_avx512() { return {run_bytes, run_bytes, run_float32, read}; }

}  // namespace fulcrum
