// AVX-512 intrinsics in plain C++, for machines without the instructions: SIMDe's, and those that
// its packaged versions lack. Included by the AVX-512 files of cpp/cpu in place of immintrin.h.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats/float16.h"

inline __m512i emulated_cvtepu16_epi32(__m256i values) {
  uint16_t in[16];
  int32_t out[16];
  std::memcpy(in, &values, sizeof(in));
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  return _mm512_loadu_si512(out);
}

inline __m512i emulated_cvtepu8_epi16(__m256i values) {
  uint8_t in[32];
  int16_t out[32];
  std::memcpy(in, &values, sizeof(in));
  for (int i = 0; i < 32; ++i) out[i] = in[i];
  return _mm512_loadu_si512(out);
}

inline __m512 emulated_cvtepi32_ps(__m512i values) {
  int32_t in[16];
  float out[16];
  std::memcpy(in, &values, sizeof(in));
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(in[i]);
  return _mm512_loadu_ps(out);
}

inline __m512 emulated_cvtph_ps(__m256i values) {
  __m128i halves[2];
  float out[16];
  std::memcpy(halves, &values, sizeof(halves));
  for (int i = 0; i < 2; ++i) {
    const __m256 eight = _mm256_cvtph_ps(halves[i]);
    std::memcpy(out + i * 8, &eight, sizeof(eight));
  }
  return _mm512_loadu_ps(out);
}

inline __m512i emulated_cvtepi8_epi32(__m128i values) {
  int8_t in[16];
  int32_t out[16];
  std::memcpy(in, &values, sizeof(in));
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  return _mm512_loadu_si512(out);
}

inline __m512i emulated_cvtps_epi32(__m512 values) {
  float in[16];
  int32_t out[16];
  _mm512_storeu_ps(in, values);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<int32_t>(std::nearbyint(in[i]));
  return _mm512_loadu_si512(out);
}

inline __m512 emulated_shuffle_f32x4(__m512 a, __m512 b, int select) {
  float in[2][16], out[16];
  _mm512_storeu_ps(in[0], a);
  _mm512_storeu_ps(in[1], b);
  for (int quarter = 0; quarter < 4; ++quarter) {
    const float* from = in[quarter / 2] + (select >> 2 * quarter & 3) * 4;
    std::memcpy(out + quarter * 4, from, 4 * sizeof(float));
  }
  return _mm512_loadu_ps(out);
}

inline float emulated_reduce_add_ps(__m512 values) {
  float in[16];
  _mm512_storeu_ps(in, values);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) in[i] += in[i + half];
  }
  return in[0];
}

inline float emulated_reduce_max_ps(__m512 values) {
  float in[16];
  _mm512_storeu_ps(in, values);
  return *std::max_element(in, in + 16);
}

using __mmask16 = uint16_t;

inline __m128i emulated_cvtepi32_epi8(__m512i values) {
  int32_t in[16];
  int8_t out[16];
  _mm512_storeu_si512(in, values);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<int8_t>(in[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(out));
}

inline __m512i emulated_srai_epi32(__m512i values, int count) {
  int32_t lanes[16];
  _mm512_storeu_si512(lanes, values);
  for (int32_t& lane : lanes) lane >>= count;
  return _mm512_loadu_si512(lanes);
}

inline int32_t emulated_reduce_add_epi32(__m512i values) {
  uint32_t in[16], sum = 0;
  _mm512_storeu_si512(in, values);
  for (uint32_t lane : in) sum += lane;
  return static_cast<int32_t>(sum);
}

inline uint32_t emulated_reduce_max_epu32(__m512i values) {
  uint32_t in[16];
  _mm512_storeu_si512(in, values);
  return *std::max_element(in, in + 16);
}

// Rounded once: kernels rely on it.
inline __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  float x[16], y[16], z[16];
  _mm512_storeu_ps(x, a);
  _mm512_storeu_ps(y, b);
  _mm512_storeu_ps(z, c);
  for (int i = 0; i < 16; ++i) z[i] = std::fma(x[i], y[i], z[i]);
  return _mm512_loadu_ps(z);
}

// Of the immediates only 9: the fraction above the next lower integer, 0 of an infinity.
inline __m512 emulated_reduce_ps(__m512 values) {
  float lanes[16];
  _mm512_storeu_ps(lanes, values);
  for (float& lane : lanes) lane = std::isinf(lane) ? 0.0f : lane - std::floor(lane);
  return _mm512_loadu_ps(lanes);
}

// Subnormal values count as zero in the instructions of AVX512-BF16, and results that would be
// subnormal become zero.
inline float without_subnormals(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline __m512bh emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
  float in[32];
  uint16_t out[32];
  _mm512_storeu_ps(in, low);
  _mm512_storeu_ps(in + 16, high);
  for (int i = 0; i < 32; ++i) out[i] = fulcrum::float_to_bf16(without_subnormals(in[i]));
  return (__m512bh)_mm512_loadu_si512(out);
}

// As Intel's manual describes the operation: the odd product first, each addition rounded.
inline __m512 emulated_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  uint16_t left[32], right[32];
  float out[16];
  _mm512_storeu_si512(left, (__m512i)a);
  _mm512_storeu_si512(right, (__m512i)b);
  _mm512_storeu_ps(out, sums);
  const auto value = [](uint16_t bits) { return without_subnormals(fulcrum::bf16_to_float(bits)); };
  for (int i = 0; i < 16; ++i) {
    for (int part = 1; part >= 0; --part) {
      const float x = value(left[i * 2 + part]), y = value(right[i * 2 + part]);
      out[i] = without_subnormals(std::fma(x, y, without_subnormals(out[i])));
    }
  }
  return _mm512_loadu_ps(out);
}

#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_fmadd_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtps_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_cvtepi32_epi8
#undef _mm512_srai_epi32
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_epu32
#undef _mm512_reduce_ps
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_cvtepu16_epi32(a) emulated_cvtepu16_epi32(a)
#define _mm512_cvtepu8_epi16(a) emulated_cvtepu8_epi16(a)
#define _mm512_fmadd_ps(a, b, c) emulated_fmadd_ps(a, b, c)
#define _mm512_cvtepi32_ps(a) emulated_cvtepi32_ps(a)
#define _mm512_cvtph_ps(a) emulated_cvtph_ps(a)
#define _mm512_cvtepi8_epi32(a) emulated_cvtepi8_epi32(a)
#define _mm512_cvtps_epi32(a) emulated_cvtps_epi32(a)
#define _mm512_shuffle_f32x4(a, b, select) emulated_shuffle_f32x4(a, b, select)
#define _mm512_reduce_add_ps(a) emulated_reduce_add_ps(a)
#define _mm512_reduce_max_ps(a) emulated_reduce_max_ps(a)
#define _mm512_cvtepi32_epi8(a) emulated_cvtepi32_epi8(a)
#define _mm512_srai_epi32(a, count) emulated_srai_epi32(a, count)
#define _mm512_reduce_add_epi32(a) emulated_reduce_add_epi32(a)
#define _mm512_reduce_max_epu32(a) emulated_reduce_max_epu32(a)
#define _mm512_reduce_ps(a, immediate) emulated_reduce_ps(a)
#define _mm512_cvtne2ps_pbh(a, b) emulated_cvtne2ps_pbh(a, b)
#define _mm512_dpbf16_ps(a, b, c) emulated_dpbf16_ps(a, b, c)

#include "amx_emulation.h"
