// Sampling noise: a counter-based generator whose value depends on (seed, noise_position, token id)
// alone, so that a text does not depend on what else runs (invariant 8), and so that a drafter that
// uses the same noise agrees with the target as often as their two distributions allow.
#pragma once

#include <cmath>
#include <cstdint>

namespace fulcrum {

// What seed and position contribute, mixed once per row.
struct NoiseKey {
  uint32_t low;
  uint32_t high;
};

// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
// OOPSLA 2014): a bijection of 64 bits.
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The seed is mixed before the position is added, so that (seed, position + 1) is no other seed's
// (seed', position).
inline NoiseKey noise_key(uint64_t seed, int32_t noise_position) {
  const uint64_t step = 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(noise_position) + 1);
  const uint64_t key = mix_bits(mix_bits(seed + 0x9e3779b97f4a7c15u) + step);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// 32 uniform bits for one token. The multipliers and shifts are those of triple32 (Wellons,
// hash-prospector); the second key word enters after the first round, so that two rows whose first
// words differ in a few low bits do not see each other's noise with the ids exchanged. Needs 32-bit
// multiplications only: loops over ids vectorise on every instruction set.
// `Word` is uint32_t or a vector of them.
template <class Word>
inline Word noise_bits(NoiseKey key, Word token_id) {
  Word x = token_id ^ key.low;
  x = (x ^ (x >> 17)) * 0xed5ad4bbu;
  x ^= key.high;
  x = (x ^ (x >> 11)) * 0xac4c1b51u;
  x = (x ^ (x >> 15)) * 0x31848babu;
  return x ^ (x >> 14);
}

// The noise as an exponential variable E = -log(1 - u), u = (bits + 1/2) / 2^32, never 0 or
// infinite: 2^-33 <= E < 22.9. The token with the least E / weight is a sample of the weights,
// which is the Gumbel-max trick with -log applied to both sides (-log E is a Gumbel variable).
inline double exponential_noise(uint32_t bits) {
  return -std::log1p(-(static_cast<double>(bits) + 0.5) * 0x1p-32);
}

}  // namespace fulcrum
