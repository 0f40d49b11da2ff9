// The operations of ops.h, written once over `Simd`. Each vector_<isa>.cpp includes its simd
// header, then this file, and so compiles its own copy with its own flags.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "../ops.h"

namespace fulcrum {
namespace {

using Vector = Simd::Vector;
constexpr int kWidth = Simd::kWidth;

// e^x by 2^n * e^r with |r| <= ln(2) / 2 and a polynomial of degree 6 for e^r (the coefficients of
// the Taylor series are within 2e-7 relative there). Below the normal range the result is the
// smallest normal number, above it a finite maximum.
inline Vector exp(Vector x) {
  x = Simd::min(Simd::max(x, Simd::set(-87.f)), Simd::set(88.f));
  const Vector n = Simd::round(Simd::mul(x, Simd::set(1.44269504f)));
  Vector r = Simd::fma(n, Simd::set(-0.693359375f), x);
  r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
  Vector p = Simd::set(1.f / 720);
  p = Simd::fma(p, r, Simd::set(1.f / 120));
  p = Simd::fma(p, r, Simd::set(1.f / 24));
  p = Simd::fma(p, r, Simd::set(1.f / 6));
  p = Simd::fma(p, r, Simd::set(0.5f));
  p = Simd::fma(p, r, Simd::set(1.f));
  p = Simd::fma(p, r, Simd::set(1.f));
  return Simd::scale_by_exp2(p, n);
}

// Calls op(offset, count) for whole vectors, then for what is left, fewer than a vector.
template <typename Whole, typename Rest>
inline void for_vectors(int n, Whole whole, Rest rest) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) whole(i);
  if (i < n) rest(i, n - i);
}

inline Vector load_part(const float* p, int count) {
  float part[kWidth] = {};
  std::memcpy(part, p, sizeof(float) * count);
  return Simd::load(part);
}

inline void store_part(float* p, Vector v, int count) {
  float part[kWidth];
  Simd::store(part, v);
  std::memcpy(p, part, sizeof(float) * count);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  Vector squares = Simd::zero();
  for_vectors(
      n,
      [&](int i) {
        const Vector v = Simd::load(x + i);
        squares = Simd::fma(v, v, squares);
      },
      [&](int i, int count) {
        const Vector v = load_part(x + i, count);
        squares = Simd::fma(v, v, squares);
      });
  const float inverse = 1.f / std::sqrt(Simd::sum(squares) / static_cast<float>(n) + eps);
  const Vector factor = Simd::set(inverse);
  for_vectors(
      n,
      [&](int i) {
        const Vector normed = Simd::mul(Simd::load(x + i), factor);
        Simd::store(out + i, Simd::mul(normed, Simd::load(weight + i)));
      },
      [&](int i, int count) {
        const Vector normed = Simd::mul(load_part(x + i, count), factor);
        store_part(out + i, Simd::mul(normed, load_part(weight + i, count)), count);
      });
}

void add(float* y, const float* x, int n) {
  for_vectors(
      n, [&](int i) { Simd::store(y + i, Simd::add(Simd::load(y + i), Simd::load(x + i))); },
      [&](int i, int count) {
        store_part(y + i, Simd::add(load_part(y + i, count), load_part(x + i, count)), count);
      });
}

void scale(float* y, float factor, int n) {
  const Vector f = Simd::set(factor);
  for_vectors(
      n, [&](int i) { Simd::store(y + i, Simd::mul(Simd::load(y + i), f)); },
      [&](int i, int count) { store_part(y + i, Simd::mul(load_part(y + i, count), f), count); });
}

inline Vector silu(Vector x) {
  const Vector one = Simd::set(1.f);
  return Simd::div(x, Simd::add(one, exp(Simd::sub(Simd::zero(), x))));
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Vector gelu_tanh(Vector x) {
  const Vector cubic = Simd::mul(Simd::mul(x, x), Simd::mul(x, Simd::set(0.044715f)));
  const Vector u = Simd::mul(Simd::set(-2.f * 0.7978845608f), Simd::add(x, cubic));
  return Simd::div(x, Simd::add(Simd::set(1.f), exp(u)));
}

template <typename Function>
inline void gate_with(Function function, const float* gate, const float* up, int n, float* out) {
  for_vectors(
      n,
      [&](int i) {
        Simd::store(out + i, Simd::mul(function(Simd::load(gate + i)), Simd::load(up + i)));
      },
      [&](int i, int count) {
        const Vector activated = function(load_part(gate + i, count));
        store_part(out + i, Simd::mul(activated, load_part(up + i, count)), count);
      });
}

void gate(Activation activation, const float* gate, const float* up, int n, float* out) {
  if (activation == Activation::kSilu) {
    gate_with([](Vector x) { return silu(x); }, gate, up, n, out);
  } else {
    gate_with([](Vector x) { return gelu_tanh(x); }, gate, up, n, out);
  }
}

void rotate(float* head, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  const auto turn = [&](Vector a, Vector b, Vector c, Vector s, Vector* low, Vector* high) {
    *low = Simd::sub(Simd::mul(a, c), Simd::mul(b, s));
    *high = Simd::add(Simd::mul(b, c), Simd::mul(a, s));
  };
  for_vectors(
      half,
      [&](int i) {
        Vector low, high;
        turn(Simd::load(head + i), Simd::load(head + half + i), Simd::load(cos + i),
             Simd::load(sin + i), &low, &high);
        Simd::store(head + i, low);
        Simd::store(head + half + i, high);
      },
      [&](int i, int count) {
        Vector low, high;
        turn(load_part(head + i, count), load_part(head + half + i, count),
             load_part(cos + i, count), load_part(sin + i, count), &low, &high);
        store_part(head + i, low, count);
        store_part(head + half + i, high, count);
      });
}

}  // namespace
}  // namespace fulcrum
