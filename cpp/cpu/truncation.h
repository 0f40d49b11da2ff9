// Top-k and top-p: from a row of weights to the tokens that they leave. The sampler calls it.
//
// The vocabulary is never sorted. Candidates are collected from the heaviest band of weights
// downwards, a factor of 16 at a time, until the set to keep must end inside the last band; only
// that band is searched. Equal weights are ordered by id, the lower one first.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>
#include <functional>

#include "row_passes.h"
#include "sampler.h"

namespace fulcrum {

constexpr int kFewCandidates = 32;  // so few are sorted
constexpr float kBandRatio = 1.0f / 16;

// Heavier first, then the lower id.
inline uint64_t weight_key(float weight, uint32_t id) {
  return uint64_t{std::bit_cast<uint32_t>(weight)} << 32 | static_cast<uint32_t>(~id);
}

// Appends tokens with a weight in [low, high), in order of id, to the n candidates of the scratch.
inline int collect_band(const float* weights, int V, float low, float high, int n,
                        SamplerScratch& s) {
  for (int b = 0; b < num_blocks(V); ++b) {
    if (s.block_max[b] < low) continue;
    for (int i = b * kBlock; i < block_end(b, V); i += kChunk) {
      const FloatChunk w = FloatChunk::load(weights + i, V - i, 0.0f);
      Mask inside = {};
      for (Floats part : w.part) inside |= (part >= low) & (part < high);
      if (!any_of(inside)) continue;
      for (int j = i; j < std::min(V, i + kChunk); ++j) {
        s.weights[n] = weights[j];  // overwritten by the next one unless it counts
        s.ids[n] = static_cast<uint32_t>(j);
        n += (weights[j] >= low) & (weights[j] < high);
      }
    }
  }
  return n;
}

struct Tail {
  double mass = 0.0;
  int count = 0;
};

// Mass and number of the weights that are at least `low`, which is positive.
inline Tail tail_of(const float* weights, int n, float low) {
  Doubles mass[kVectors] = {};
  Mask minus_count[kVectors] = {};
  for (int i = 0; i < n; i += kChunk) {
    const FloatChunk w = FloatChunk::load(weights + i, n - i, 0.0f);
    for (int k = 0; k < kVectors; ++k) {
      const Mask counts = w.part[k] >= low;
      mass[k] += __builtin_convertvector(select(counts, w.part[k], Floats{}), Doubles);
      minus_count[k] += counts;
    }
  }
  Tail tail;
  for (int k = 0; k < kVectors; ++k) {
    for (int j = 0; j < 4; ++j) {
      tail.mass += mass[k][j];
      tail.count -= minus_count[k][j];
    }
  }
  return tail;
}

// The key of the k-th heaviest of n candidates, n >= k >= 1.
inline uint64_t kth_key(const float* weights, const uint32_t* ids, int n, int k, uint64_t* keys) {
  for (int i = 0; i < n; ++i) keys[i] = weight_key(weights[i], ids[i]);
  std::nth_element(keys, keys + k - 1, keys + n, std::greater<>());
  return keys[k - 1];
}

// The key of the lightest candidate of the fewest heaviest ones whose mass is at least `target`.
// All weights lie in [low, high); among equal weights the ids ascend. Bisects the bits of the
// weight, which order as the weights do, until few candidates, or equal ones, are left to walk.
inline uint64_t nucleus_key(const float* weights, const uint32_t* ids, int n, double target,
                            float low, float high, uint64_t* keys) {
  uint32_t low_bits = std::bit_cast<uint32_t>(low);
  uint32_t high_bits = std::bit_cast<uint32_t>(high);
  Tail above;              // of weights from `high` up: less than the target
  int count_from_low = n;  // their mass is at least the target, or they are all there is
  while (high_bits - low_bits > 1 && count_from_low - above.count > kFewCandidates) {
    const uint32_t middle = low_bits + (high_bits - low_bits) / 2;
    const Tail tail = tail_of(weights, n, std::bit_cast<float>(middle));
    if (tail.mass >= target) {
      low_bits = middle;
      count_from_low = tail.count;
    } else {
      high_bits = middle;
      above = tail;
    }
  }
  low = std::bit_cast<float>(low_bits);
  high = std::bit_cast<float>(high_bits);
  int num_keys = 0;
  for (int i = 0; i < n; ++i) {
    if (weights[i] >= low && weights[i] < high) keys[num_keys++] = weight_key(weights[i], ids[i]);
  }
  if (high_bits - low_bits > 1) std::sort(keys, keys + num_keys, std::greater<>());
  uint64_t lightest = 0;  // rounding may leave the sum of all short of the target: then keep all
  double mass = above.mass;
  for (int i = 0; i < num_keys && mass < target; ++i) {
    lightest = keys[i];
    mass += static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(lightest >> 32)));
  }
  return lightest;
}

// Drops the candidates behind `boundary`; keeps the order of the others.
inline int keep_from(uint64_t boundary, int n, SamplerScratch& s) {
  int kept = 0;
  for (int i = 0; i < n; ++i) {
    const float weight = s.weights[i];
    const uint32_t id = s.ids[i];
    s.weights[kept] = weight;
    s.ids[kept] = id;
    kept += weight_key(weight, id) >= boundary;
  }
  return kept;
}

// Puts what top-k and top-p leave into the scratch's candidates; returns their number, at least 1.
// Exact: a band is collected only after all heavier ones, so when the candidates' count reaches
// top_k, or their mass reaches top_p's share, the set's lightest member is in the last band.
inline int truncate_row(const RowParams& p, const float* weights, int V, double total,
                        SamplerScratch& s) {
  const bool by_count = p.top_k > 0 && p.top_k < V;
  const int max_count = by_count ? p.top_k : V;
  const double share = std::max(static_cast<double>(p.top_p), 0.0);
  const double target = by_count ? DBL_MAX : std::max(share * total, DBL_MIN);
  float low = kBandRatio;
  float high = 2.0f;
  double mass_above = 0.0;
  int begin = 0;  // of the last band
  int n = 0;
  for (;; high = low, low = std::max(low * kBandRatio, FLT_MIN)) {
    n = collect_band(weights, V, low, high, n, s);
    const double mass = tail_of(s.weights.data() + begin, n - begin, low).mass;
    if (n >= max_count || mass_above + mass >= target || low <= FLT_MIN) break;
    mass_above += mass;
    begin = n;
  }
  uint64_t* keys = s.keys.data();
  if (!by_count) {
    return keep_from(nucleus_key(s.weights.data() + begin, s.ids.data() + begin, n - begin,
                                 target - mass_above, low, high, keys),
                     n, s);
  }
  if (n > max_count) {
    n = keep_from(
        kth_key(s.weights.data() + begin, s.ids.data() + begin, n - begin, max_count - begin, keys),
        n, s);
  }
  if (p.top_p >= 1.0f) return n;
  const double kept_mass = tail_of(s.weights.data(), n, FLT_MIN).mass;
  return keep_from(nucleus_key(s.weights.data(), s.ids.data(), n,
                               std::max(share * kept_mass, DBL_MIN), FLT_MIN, 2.0f, keys),
                   n, s);
}

}  // namespace fulcrum
