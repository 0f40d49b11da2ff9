// Format int8: groups of 32 weights along K share an fp16 scale; w = scale * q, q in -128…127.
// Exact for Q8_0, Q5_0 and Q4_0. 8.5 bits a weight.
//
// Quants are stored with an offset of 128, as bytes 0…255, in both layouts of the vector
// instruction sets: AVX-512's vpdpbusd wants one unsigned operand, and AVX2 splits the byte into
// two nibbles (see linear_avx2.cpp). The offset is undone by 128 times the sum of the activations.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/float16.h"
#include "formats/tile.h"
#include "linear.h"

namespace fulcrum {

// Portable layout: a row is its groups in order.
struct Int8Group {
  uint16_t scale;
  int8_t quants[kGroupSize];
};
static_assert(sizeof(Int8Group) == 34);

inline void pack_int8_group(const uint8_t* quants, float scale, Int8Group* group) {
  std::memcpy(group->quants, quants, kGroupSize);
  group->scale = float_to_half(scale);
}

inline void unpack_int8_group(const Int8Group& group, float* out) {
  const float scale = half_to_float(group.scale);
  for (int k = 0; k < kGroupSize; ++k) out[k] = scale * static_cast<float>(group.quants[k]);
}

// Tile layout: a group of 16 channels. Four consecutive k of a channel fill a 32-bit lane, the
// operand of a four-way dot product whose other side is one broadcast of four activations.
// Lanes256: for channels 0…7 the 8 steps of four k, 32 bytes each; then likewise channels 8…15.
// Lanes512: the 8 steps of four k, 64 bytes each.
struct Int8Tile {
  uint8_t quants[kTileChannels * kGroupSize];
  uint16_t scales[kTileChannels];
};
static_assert(sizeof(Int8Tile) == 544);  // a multiple of 32: AVX2 loads never cross a cache line

inline int int8_offset(Lanes256, int channel, int k) {
  return channel / 8 * 256 + k / 4 * 32 + channel % 8 * 4 + k % 4;
}
inline int int8_offset(Lanes512, int channel, int k) { return k / 4 * 64 + channel * 4 + k % 4; }

// Packs one group of one channel.
template <typename Lanes>
void pack_int8(const uint8_t* quants, float scale, int channel, Int8Tile* tile) {
  for (int k = 0; k < kGroupSize; k += 4) {
    uint32_t four;
    std::memcpy(&four, quants + k, 4);
    four ^= 0x80808080u;  // signed to offset by 128
    std::memcpy(tile->quants + int8_offset(Lanes{}, channel, k), &four, 4);
  }
  tile->scales[channel] = float_to_half(scale);
}

template <typename Lanes>
void unpack_int8(const Int8Tile& tile, int channel, float* out) {
  const float scale = half_to_float(tile.scales[channel]);
  for (int k = 0; k < kGroupSize; ++k) {
    out[k] = scale * static_cast<float>(tile.quants[int8_offset(Lanes{}, channel, k)] - 128);
  }
}

}  // namespace fulcrum
