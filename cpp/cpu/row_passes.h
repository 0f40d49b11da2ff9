// Passes over one row of floats: maximum, sum of exponentials, weights. The sampler calls them.
// They are written over vectors of four lanes, which every 64-bit instruction set has; each sum has
// one fixed order, whatever the build.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <limits>

namespace fulcrum {

constexpr int kBlock = 256;  // values that share a maximum, by which passes skip them
constexpr int kChunk = 16;   // values of one turn of a loop: four vectors hide the latency of one
constexpr int kVectors = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Mask = int32_t __attribute__((vector_size(16)));  // of a comparison: -1 or 0 a lane
using Doubles = double __attribute__((vector_size(32)));

inline int num_blocks(int V) { return (V + kBlock - 1) / kBlock; }
inline int block_end(int block, int V) { return std::min(V, (block + 1) * kBlock); }

template <class Element, class Vector>
struct ChunkOf {
  Vector part[kVectors];

  // Reads values[0, n); the rest of the chunk is `padding`.
  static ChunkOf load(const Element* values, int n, Element padding) {
    ChunkOf chunk;
    if (n >= kChunk) {
      std::memcpy(&chunk, values, sizeof chunk);
    } else {
      Element padded[kChunk];
      std::fill(std::copy_n(values, n, padded), padded + kChunk, padding);
      std::memcpy(&chunk, padded, sizeof chunk);
    }
    return chunk;
  }

  void store(Element* values, int n) const {
    if (n >= kChunk) {
      std::memcpy(values, this, sizeof *this);
    } else {
      std::memcpy(values, this, static_cast<size_t>(n) * sizeof(Element));
    }
  }
};
using FloatChunk = ChunkOf<float, Floats>;
using WordChunk = ChunkOf<uint32_t, Words>;

template <class Vector>
inline Vector select(Mask mask, Vector a, Vector b) {
  return mask ? a : b;
}

inline bool any_of(Mask mask) {
  uint64_t halves[2];
  std::memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
}

inline float largest_lane(const FloatChunk& chunk) {
  float lanes[kChunk];
  chunk.store(lanes, kChunk);
  return *std::max_element(lanes, lanes + kChunk);
}

inline double sum_lanes(const FloatChunk& chunk) {
  float lanes[kChunk];
  chunk.store(lanes, kChunk);
  double sum = 0.0;
  for (float lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

inline FloatChunk filled(float value) {
  FloatChunk chunk;
  for (Floats& part : chunk.part) part = Floats{value, value, value, value};
  return chunk;
}

struct RowScan {
  float max = -kInfinity;
  int32_t argmax = -1;  // the lowest id of those with the largest logit
  bool finite = true;   // no NaN, no +inf
};

// One pass: the largest logit of each block and of the row.
inline RowScan scan_row(const float* logits, int V, float* block_max) {
  RowScan scan;
  Mask bad = {};
  int best_block = 0;
  for (int b = 0; b < num_blocks(V); ++b) {
    FloatChunk max = filled(-kInfinity);
    for (int i = b * kBlock; i < block_end(b, V); i += kChunk) {
      const FloatChunk x = FloatChunk::load(logits + i, V - i, -kInfinity);
      for (int k = 0; k < kVectors; ++k) {
        max.part[k] = select(x.part[k] > max.part[k], x.part[k], max.part[k]);
        bad |= ~(x.part[k] <= FLT_MAX);
      }
    }
    block_max[b] = largest_lane(max);
    if (block_max[b] > scan.max) {
      scan.max = block_max[b];
      best_block = b;
    }
  }
  scan.finite = !any_of(bad);
  const float* first = logits + best_block * kBlock;
  const float* last = logits + block_end(best_block, V);
  scan.argmax = static_cast<int32_t>(std::find(first, last, scan.max) - logits);
  return scan;
}

// exp(z) for z <= 0, 0 below -87; exact at 0, elsewhere within 2 units in the last place: 2^n times
// a polynomial of the remainder (the coefficients are those of Cephes' expf).
inline Floats exp_negative(Floats z) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr uint32_t kBias = std::bit_cast<uint32_t>(kRound) - 127;
  const Floats shifted = z * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (z - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Words exponent = (std::bit_cast<Words>(shifted) - kBias) << 23;
  // Below the range, infinity included, all of the above is without meaning and is masked out.
  return select(z > -87.0f, y * std::bit_cast<Floats>(exponent), Floats{});
}

// Sum of exp(logits - max): floats within a block, doubles over the blocks.
inline double sum_exp(const float* logits, int V, float max) {
  double total = 0.0;
  for (int b = 0; b < num_blocks(V); ++b) {
    FloatChunk sum = filled(0.0f);
    for (int i = b * kBlock; i < block_end(b, V); i += kChunk) {
      const FloatChunk x = FloatChunk::load(logits + i, V - i, -kInfinity);
      for (int k = 0; k < kVectors; ++k) sum.part[k] += exp_negative(x.part[k] - max);
    }
    total += sum_lanes(sum);
  }
  return total;
}

// Replaces the logits by their weights exp((logit - max) * scale), and block_max by upper bounds of
// the blocks' weights; returns the sum. Blocks wholly below min_exponent count as zeros.
inline double weigh_row(float* logits, int V, float max, float scale, float min_exponent,
                        float* block_max) {
  double total = 0.0;
  for (int b = 0; b < num_blocks(V); ++b) {
    const float exponent = (block_max[b] - max) * scale;
    if (exponent < min_exponent) {
      block_max[b] = 0.0f;
      continue;
    }
    // Rounding may leave a lighter token's weight a little above that of the largest logit.
    block_max[b] = exp_negative(Floats{exponent})[0] * 1.00001f;
    FloatChunk sum = filled(0.0f);
    for (int i = b * kBlock; i < block_end(b, V); i += kChunk) {
      FloatChunk x = FloatChunk::load(logits + i, V - i, -kInfinity);
      for (int k = 0; k < kVectors; ++k) {
        x.part[k] = exp_negative((x.part[k] - max) * scale);
        sum.part[k] += x.part[k];
      }
      x.store(logits + i, V - i);
    }
    total += sum_lanes(sum);
  }
  return total;
}

}  // namespace fulcrum
