// Format fp8: e4m3 (Micikevicius et al. 2022: no infinities, ±448 at most) with a float scale per
// output channel. A little over 8 bits a weight; activations stay float, as with bf16.
//
// Tile layout, portable code included: the 16 scales, then for every k the 16 channels of a tile in
// order (16 bytes); in Lanes512Pairs pairs of k, as with bf16. Shifted into place, the bits of an
// e4m3 are those of an fp16 that is 256 times smaller, subnormals included, so that the conversion
// of fp16 decodes them exactly. The stored scales hold that factor, a power of two.
#pragma once

#include <bit>
#include <cstdint>

#include "formats/float16.h"
#include "formats/tile.h"

namespace fulcrum {

constexpr float kFp8Max = 448.0f;
constexpr float kFp8ToHalf = 256.0f;

struct Fp8TileRow {
  uint8_t values[kTileChannels];
};

struct Fp8Tile {
  float scales[kTileChannels];  // times kFp8ToHalf
  Fp8TileRow* rows() { return reinterpret_cast<Fp8TileRow*>(this + 1); }
  const Fp8TileRow* rows() const { return reinterpret_cast<const Fp8TileRow*>(this + 1); }
};

template <typename Lanes>
int64_t fp8_tile_bytes(int K) {
  return sizeof(Fp8Tile) + num_tile_rows(Lanes{}, K) * sizeof(Fp8TileRow);
}

inline TilePlace fp8_place(Lanes256, int channel, int k) { return place_in_order(channel, k); }
inline TilePlace fp8_place(Lanes512, int channel, int k) { return place_in_order(channel, k); }
inline TilePlace fp8_place(Lanes512Pairs, int channel, int k) { return place_in_pairs(channel, k); }

// Rounds to nearest even; beyond the range it gives the largest value. NaN becomes that, too.
inline uint8_t float_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 24 & 0x80u;
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
  if (!(magnitude < kFp8Max)) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude < 0x1p-6f) {  // subnormal: the addition leaves the multiple of 2^-9 in the bits
    const uint32_t shifted = std::bit_cast<uint32_t>(magnitude + 0x1p14f);
    return static_cast<uint8_t>(sign | (shifted - std::bit_cast<uint32_t>(0x1p14f)));
  }
  const uint32_t rounded = (bits & 0x7fffffffu) + 0x7ffffu + (bits >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

// 1 / kFp8ToHalf of the value.
inline float e4m3_to_half_scale(uint8_t value) {
  return half_to_float(static_cast<uint16_t>((value & 0x80u) << 8 | (value & 0x7fu) << 7));
}

}  // namespace fulcrum
