// Format int8: groups of 32 weights along K share an fp16 scale; w = scale * q, q in -128…127.
// Exact for Q8_0, Q5_0 and Q4_0. 8.5 bits a weight.
//
// In the layout of AVX-512 quants are stored with an offset of 128, as bytes 0…255: vpdpbusd wants
// one unsigned operand. The offset is undone by 128 times the sum of the activations. AVX2 has no
// exact product of bytes that large, widens them to 16 bits, and stores them as they are.
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

// Tile layout: a group of 16 channels. Consecutive k of a channel fill a 32-bit lane, the operand
// of a dot product whose other side is one broadcast of as many activations.
// Lanes256: the 16 steps of two k, 32 bytes each, which become 16 bits.
// Lanes512: the 8 steps of four k, 64 bytes each.
struct Int8Tile {
  uint8_t quants[kTileChannels * kGroupSize];
  uint16_t scales[kTileChannels];
};
static_assert(sizeof(Int8Tile) == 544);  // a multiple of 32: AVX2 loads never cross a cache line

constexpr uint8_t int8_offset_bits(Lanes256) { return 0; }
constexpr uint8_t int8_offset_bits(Lanes512) { return 0x80; }  // signed to offset by 128
inline int int8_place(Lanes256, int channel, int k) { return k / 2 * 32 + channel * 2 + k % 2; }
inline int int8_place(Lanes512, int channel, int k) { return k / 4 * 64 + channel * 4 + k % 4; }

// Packs one group of one channel.
template <typename Lanes>
void pack_int8(const uint8_t* quants, float scale, int channel, Int8Tile* tile) {
  for (int k = 0; k < kGroupSize; ++k) {
    tile->quants[int8_place(Lanes{}, channel, k)] = quants[k] ^ int8_offset_bits(Lanes{});
  }
  tile->scales[channel] = float_to_half(scale);
}

template <typename Lanes>
void unpack_int8(const Int8Tile& tile, int channel, float* out) {
  const float scale = half_to_float(tile.scales[channel]);
  for (int k = 0; k < kGroupSize; ++k) {
    const uint8_t stored = tile.quants[int8_place(Lanes{}, channel, k)];
    out[k] = scale * static_cast<float>(static_cast<int8_t>(stored ^ int8_offset_bits(Lanes{})));
  }
}

}  // namespace fulcrum
