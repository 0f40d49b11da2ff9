// Format int4: groups of 32 weights along K share an fp16 scale and an fp16 minimum;
// w = scale * q + minimum, q in 0…15. Exact for Q4_0 and Q4_1. 5 bits a weight.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/float16.h"
#include "formats/tile.h"
#include "linear.h"

namespace fulcrum {

// Portable layout: a row is its groups in order; byte i holds k = i (low nibble) and k = i + 16.
struct Int4Group {
  uint16_t scale;
  uint16_t minimum;
  uint8_t quants[kGroupSize / 2];
};
static_assert(sizeof(Int4Group) == 20);

inline void pack_int4_group(const uint8_t* quants, float scale, float minimum, Int4Group* group) {
  for (int i = 0; i < kGroupSize / 2; ++i) {
    group->quants[i] = static_cast<uint8_t>(quants[i] | quants[i + kGroupSize / 2] << 4);
  }
  group->scale = float_to_half(scale);
  group->minimum = float_to_half(minimum);
}

inline void unpack_int4_group(const Int4Group& group, float* out) {
  const float scale = half_to_float(group.scale);
  const float minimum = half_to_float(group.minimum);
  for (int i = 0; i < kGroupSize / 2; ++i) {
    out[i] = scale * static_cast<float>(group.quants[i] & 15) + minimum;
    out[i + kGroupSize / 2] = scale * static_cast<float>(group.quants[i] >> 4) + minimum;
  }
}

// Tile layout: a group of 16 channels, five cache lines that hold all that a kernel needs of it.
// Once unpacked, four consecutive k of a channel fill a 32-bit lane, as in Int8Tile. The low and
// the high nibbles of a load are the operands of two dot products, by a mask and a shift:
// Lanes256: 8 steps of four k, 32 bytes each; low nibbles channels 0…7, high ones 8…15.
// Lanes512: 4 rows of 64 bytes; row i holds step i in the low nibbles, step i + 4 in the high ones.
struct Int4Tile {
  uint8_t quants[kTileChannels * kGroupSize / 2];
  uint16_t scales[kTileChannels];
  uint16_t minima[kTileChannels];
};
static_assert(sizeof(Int4Tile) == 320);

struct NibblePlace {
  int offset;  // of the first of four consecutive bytes, which hold four consecutive k
  int shift;
};

inline NibblePlace int4_place(Lanes256, int channel, int k) {
  return {k / 4 * 32 + channel % 8 * 4, channel / 8 * 4};
}
inline NibblePlace int4_place(Lanes512, int channel, int k) {
  return {k / 4 % 4 * 64 + channel * 4, k / 16 * 4};
}

// Packs one group of one channel. The nibbles of the tile must be zero.
template <typename Lanes>
void pack_int4(const uint8_t* quants, float scale, float minimum, int channel, Int4Tile* tile) {
  for (int k = 0; k < kGroupSize; k += 4) {
    const NibblePlace place = int4_place(Lanes{}, channel, k);
    uint32_t four, stored;
    std::memcpy(&four, quants + k, 4);
    std::memcpy(&stored, tile->quants + place.offset, 4);
    stored |= four << place.shift;
    std::memcpy(tile->quants + place.offset, &stored, 4);
  }
  tile->scales[channel] = float_to_half(scale);
  tile->minima[channel] = float_to_half(minimum);
}

template <typename Lanes>
void unpack_int4(const Int4Tile& tile, int channel, float* out) {
  const float scale = half_to_float(tile.scales[channel]);
  const float minimum = half_to_float(tile.minima[channel]);
  for (int k = 0; k < kGroupSize; ++k) {
    const NibblePlace place = int4_place(Lanes{}, channel, k);
    const int quant = tile.quants[place.offset + k % 4] >> place.shift & 15;
    out[k] = scale * static_cast<float>(quant) + minimum;
  }
}

}  // namespace fulcrum
