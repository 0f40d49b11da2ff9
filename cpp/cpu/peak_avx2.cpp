// Peak of x86-64 with AVX2 and FMA: the loops of peak.h over the instructions of linear_avx2.cpp.
// Compiled with ISA flags, so everything but the entry point is local to the file.
//
// The empty asm statements emit nothing. They make an operand look changed, so that the compiler
// neither computes a product once for all chains nor moves it out of the loop, and keeps every sum
// in a register of its own.
#include <immintrin.h>

#include "cpu/peak.h"

namespace fulcrum {
namespace {

constexpr double kByteProducts = 32;  // of a vpmaddubsw
constexpr double kFloatProducts = 8;

uint64_t xor_words(__m256i values) {
  const __m128i half =
      _mm_xor_si128(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(half) ^ _mm_extract_epi64(half, 1));
}

// vpmaddubsw, vpmaddwd, vpaddd: what a product of bytes takes that may not overflow 16 bits.
double run_int8(int64_t num_iterations) {
  constexpr int kChains = 8;
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i activations = _mm256_set1_epi8(-3);
  __m256i weights = _mm256_set1_epi8(5);
  __m256i sums[kChains];
#pragma GCC unroll 16
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm256_setzero_si256();
  for (int64_t i = 0; i < num_iterations; ++i) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) {
      asm volatile("" : "+x"(weights));
      const __m256i pairs = _mm256_maddubs_epi16(weights, activations);
      sums[chain] = _mm256_add_epi32(sums[chain], _mm256_madd_epi16(pairs, ones));
      asm volatile("" : "+x"(sums[chain]));
    }
  }
  return 2 * kByteProducts * kChains * static_cast<double>(num_iterations);
}

// Products of 4-bit weights may be added in 16 bits over a group of eight steps, so that there is
// one vpmaddwd for eight vpmaddubsw.
double run_int4(int64_t num_iterations) {
  constexpr int kChains = 4, kSteps = 8;
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i activations = _mm256_set1_epi8(-3);
  __m256i weights = _mm256_set1_epi8(5);
  __m256i sums[kChains];
#pragma GCC unroll 16
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm256_setzero_si256();
  for (int64_t i = 0; i < num_iterations; ++i) {
    __m256i pairs[kChains];
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        asm volatile("" : "+x"(weights));
        const __m256i product = _mm256_maddubs_epi16(weights, activations);
        pairs[chain] = step == 0 ? product : _mm256_add_epi16(pairs[chain], product);
        asm volatile("" : "+x"(pairs[chain]));
      }
    }
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = _mm256_add_epi32(sums[chain], _mm256_madd_epi16(pairs[chain], ones));
      asm volatile("" : "+x"(sums[chain]));
    }
  }
  return 2 * kByteProducts * kSteps * kChains * static_cast<double>(num_iterations);
}

double run_float32(int64_t num_iterations) {
  constexpr int kChains = 12;
  const __m256 activations = _mm256_set1_ps(0.5f);
  __m256 weights = _mm256_set1_ps(0.25f);
  __m256 sums[kChains];
#pragma GCC unroll 16
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm256_setzero_ps();
  for (int64_t i = 0; i < num_iterations; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      asm volatile("" : "+x"(weights));
      sums[chain] = _mm256_fmadd_ps(weights, activations, sums[chain]);
      asm volatile("" : "+x"(sums[chain]));
    }
  }
  return 2 * kFloatProducts * kChains * static_cast<double>(num_iterations);
}

uint64_t read(const uint8_t* data, int64_t num_bytes) {
  constexpr int kLoads = 8;
  const int64_t part_bytes = num_bytes / kReadParts;
  __m256i sums[kLoads];
#pragma GCC unroll 8
  for (int i = 0; i < kLoads; ++i) sums[i] = _mm256_setzero_si256();
  for (int64_t offset = 0; offset < part_bytes; offset += kLoads * 32) {
#pragma GCC unroll 4
    for (int part = 0; part < kReadParts; ++part) {
      const uint8_t* at = data + part * part_bytes + offset;
#pragma GCC unroll 8
      for (int i = 0; i < kLoads; ++i) {
        const __m256i* from = reinterpret_cast<const __m256i*>(at + i * 32);
        sums[i] = _mm256_xor_si256(sums[i], _mm256_load_si256(from));
      }
    }
  }
  for (int i = 1; i < kLoads; ++i) sums[0] = _mm256_xor_si256(sums[0], sums[i]);
  return xor_words(sums[0]);
}

}  // namespace

PeakLoops peak_loops_avx2() { return {run_int8, run_int4, run_float32, read}; }

}  // namespace fulcrum
