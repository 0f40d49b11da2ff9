// The softmax of attention in AVX-512, shared by the products of pairs (attention_bf16.h) and of
// integers (attention_int8.h). Included only by files compiled for AVX-512.
//
// A row's probabilities are relative to a reference, not to its largest score: the reference is
// raised only where a score exceeds it by kSlack, which few chunks but the first do. So there is no
// maximum to find across a register, and no factor for former sums, in most of them.
#pragma once

#include "attention_tile.h"

namespace fulcrum {
namespace {

constexpr float kSlack = 8.f;  // probabilities are below e^8
constexpr float kLog2E = 1.44269504f;

// 2^x, by a minimax fit of relative error 7.5e-5 (kDegree 3) or 2.6e-6 (4); zero for -infinity.
template <int kDegree>
inline Vector exp2(Vector x) {
  static_assert(kDegree == 3 || kDegree == 4);
  const Vector f = _mm512_reduce_ps(x, 9);  // x - floor(x)
  Vector p;
  if constexpr (kDegree == 3) {
    p = Simd::fma(Simd::set(7.80245215e-2f), f, Simd::set(2.26067156e-1f));
    p = Simd::fma(p, f, Simd::set(6.95833564e-1f));
    p = Simd::fma(p, f, Simd::set(9.99925196e-1f));
  } else {
    p = Simd::fma(Simd::set(1.35341678e-2f), f, Simd::set(5.20114601e-2f));
    p = Simd::fma(p, f, Simd::set(2.41442755e-1f));
    p = Simd::fma(p, f, Simd::set(6.93003833e-1f));
    p = Simd::fma(p, f, Simd::set(1.00000262f));
  }
  return _mm512_scalef_ps(p, x);
}

// The lanes that a row sees of the vector of columns that begins at `first`.
inline __mmask16 seen_lanes(const SeenColumns& seen, int first) {
  const int low = std::clamp(seen.low - first, 0, 16), high = std::clamp(seen.high - first, 0, 16);
  return static_cast<__mmask16>(((1u << high) - 1) & ~((1u << low) - 1));
}

// Raises the row's reference where its largest scores exceed it by too much; returns the factor for
// the row's former sums.
inline __attribute__((always_inline)) float raise_reference(const Tile& tile, int row,
                                                            Vector largest) {
  const float former = tile.maximum[row];
  if (_mm512_cmp_ps_mask(largest, Simd::set(former + kSlack), _CMP_GT_OQ) == 0) return 1.f;
  tile.maximum[row] = Simd::max_of(largest);
  return Simd::first(exp2<4>(Simd::set((former - tile.maximum[row]) * kLog2E)));
}

// Turns a row's scores to probabilities and gives them to keep(vector number, probabilities, seen
// lanes), in order. kWhole: the row sees all of a whole chunk. Returns the factor for the row's
// former sums.
template <bool kWhole, int kDegree, typename Keep>
inline float soften_columns(const Tile& tile, int row, const SeenColumns& seen, Keep keep) {
  constexpr int kMostVectors = kAttentionChunk / kWidth;
  const float* scores = tile.scores + row * kAttentionChunk;
  const int num_vectors = kWhole ? kMostVectors : seen.num_columns / kWidth;
  Vector values[kMostVectors];
  Vector largest = Simd::set(-FLT_MAX);
#pragma GCC unroll 8
  for (int i = 0; i < num_vectors; ++i) {
    values[i] = Simd::load(scores + i * kWidth);
    if constexpr (!kWhole) {
      values[i] =
          _mm512_mask_blend_ps(seen_lanes(seen, i * kWidth), Simd::set(-FLT_MAX), values[i]);
    }
    largest = Simd::max(largest, values[i]);
  }
  const float factor = raise_reference(tile, row, largest);
  const Vector shift = Simd::set(-tile.maximum[row] * kLog2E);
#pragma GCC unroll 8
  for (int i = 0; i < num_vectors; ++i) {
    // Hidden columns overflow to -infinity, and so to a probability of zero.
    values[i] = exp2<kDegree>(Simd::fma(values[i], Simd::set(kLog2E), shift));
  }
#pragma GCC unroll 8
  for (int i = 0; i < num_vectors; ++i) {
    keep(i, values[i], kWhole ? __mmask16{0xffff} : seen_lanes(seen, i * kWidth));
  }
  return factor;
}

}  // namespace
}  // namespace fulcrum
