// Peak of x86-64 with AVX512-BF16: vdpbf16ps, and else the loops of peak_avx512.cpp. Compiled with
// ISA flags, so everything but the entry point is local to the file. The empty asm statements are
// explained in peak_avx2.cpp.
#include <immintrin.h>

#include "cpu/peak.h"

namespace fulcrum {
namespace {

constexpr int kChains = 16;
constexpr double kPairProducts = 32;

double run_bf16(int64_t num_iterations) {
  const __m512i activations = _mm512_set1_epi16(0x3f00);  // 0.5
  __m512i weights = _mm512_set1_epi16(0x3e80);            // 0.25
  __m512 sums[kChains];
#pragma GCC unroll 16
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_setzero_ps();
  for (int64_t i = 0; i < num_iterations; ++i) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; ++chain) {
      asm volatile("" : "+v"(weights));
      sums[chain] = _mm512_dpbf16_ps(sums[chain], (__m512bh)weights, (__m512bh)activations);
      asm volatile("" : "+v"(sums[chain]));
    }
  }
  return 2 * kPairProducts * kChains * static_cast<double>(num_iterations);
}

}  // namespace

PeakLoops peak_loops_avx512_bf16() {
  PeakLoops loops = peak_loops_avx512();
  loops.bf16 = run_bf16;
  return loops;
}

}  // namespace fulcrum
