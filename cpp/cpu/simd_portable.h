// Four floats in a vector of the compiler's own: SSE2 on any x86-64, NEON on arm64.
#pragma once

#include <cstdint>
#include <cstring>

namespace fulcrum {
namespace {

struct Simd {
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t IntVector __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;

  static Vector zero() { return Vector{}; }
  static Vector set(float x) { return Vector{x, x, x, x}; }
  static Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector sub(Vector a, Vector b) { return a - b; }
  static Vector mul(Vector a, Vector b) { return a * b; }
  static Vector div(Vector a, Vector b) { return a / b; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector max(Vector a, Vector b) { return a > b ? a : b; }
  static Vector min(Vector a, Vector b) { return a < b ? a : b; }
  // To the nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
  static Vector round(Vector x) { return (x + set(12582912.f)) - set(12582912.f); }
  // x * 2^n for an integral n in the exponent's range.
  static Vector scale_by_exp2(Vector x, Vector n) {
    IntVector bits = (__builtin_convertvector(n, IntVector) + 127) << 23;
    Vector v;
    std::memcpy(&v, &bits, sizeof v);
    return x * v;
  }
  static float first(Vector v) { return v[0]; }
  static float sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float max_of(Vector v) {
    const float a = v[0] > v[1] ? v[0] : v[1];
    const float b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  static Vector load_bf16(const uint16_t* p) {
    IntVector bits = {p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16};
    Vector v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static Vector load_int8(const int8_t* p) {
    return __builtin_convertvector((IntVector{p[0], p[1], p[2], p[3]}), Vector);
  }
};

}  // namespace
}  // namespace fulcrum
