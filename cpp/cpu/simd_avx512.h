// Sixteen floats in an AVX-512 register. Included only by files compiled for AVX-512.
#pragma once

#include <cstdint>

#include "intrinsics.h"

namespace fulcrum {
namespace {

struct Simd {
  using Vector = __m512;
  static constexpr int kWidth = 16;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector set(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
  static Vector round(Vector x) { return _mm512_roundscale_ps(x, 0); }
  static Vector scale_by_exp2(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }
  static float first(Vector v) { return _mm_cvtss_f32(_mm512_castps512_ps128(v)); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static float max_of(Vector v) { return _mm512_reduce_max_ps(v); }
  static Vector load_bf16(const uint16_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Vector load_int8(const int8_t* p) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
  }
};

}  // namespace
}  // namespace fulcrum
