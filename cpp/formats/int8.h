// Format int8: groups of 32 weights along K share an fp16 scale; format int8-channel: a whole
// output channel has one float scale. w = scale * q, q in -128…127. int8 is exact for Q8_0, Q5_0
// and Q4_0. 8.5 and a little over 8 bits a weight.
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

// Portable layout of int8: a row is its groups in order.
struct Int8Group {
  uint16_t scale;
  int8_t quants[kGroupSize];
};
static_assert(sizeof(Int8Group) == 34);

// Portable layout of int8-channel: a row is its scale, then padded_k(K) quants.
inline int64_t int8_channel_row_bytes(int K) { return int64_t{sizeof(float)} + padded_k(K); }

// Tile layout: a group of 16 channels. Consecutive k of a channel fill a 32-bit lane, the operand
// of a dot product whose other side is one broadcast of as many activations.
// Lanes256: the 16 steps of two k, 32 bytes each, which become 16 bits.
// Lanes512: the 8 steps of four k, 64 bytes each.
struct Int8Quants {
  uint8_t quants[kTileChannels * kGroupSize];
};
struct Int8Tile : Int8Quants {
  uint16_t scales[kTileChannels];
};
static_assert(sizeof(Int8Tile) == 544);  // a multiple of 32: AVX2 loads never cross a cache line

// A tile of int8-channel is its scales, then the quants of all groups.
struct Int8ChannelTile {
  float scales[kTileChannels];
  Int8Quants* groups() { return reinterpret_cast<Int8Quants*>(this + 1); }
  const Int8Quants* groups() const { return reinterpret_cast<const Int8Quants*>(this + 1); }
};
static_assert(sizeof(Int8ChannelTile) == 64);

inline int64_t int8_channel_tile_bytes(int K) {
  return sizeof(Int8ChannelTile) + int64_t{num_groups(K)} * sizeof(Int8Quants);
}

constexpr uint8_t int8_offset_bits(Lanes256) { return 0; }
constexpr uint8_t int8_offset_bits(Lanes512) { return 0x80; }  // signed to offset by 128
inline int int8_place(Lanes256, int channel, int k) { return k / 2 * 32 + channel * 2 + k % 2; }
inline int int8_place(Lanes512, int channel, int k) { return k / 4 * 64 + channel * 4 + k % 4; }

// Packs one group of one channel.
template <typename Lanes>
void pack_int8(const uint8_t* quants, int channel, Int8Quants* group) {
  for (int k = 0; k < kGroupSize; ++k) {
    group->quants[int8_place(Lanes{}, channel, k)] = quants[k] ^ int8_offset_bits(Lanes{});
  }
}

template <typename Lanes>
void unpack_int8(const Int8Quants& group, float scale, int channel, float* out) {
  for (int k = 0; k < kGroupSize; ++k) {
    const uint8_t stored = group.quants[int8_place(Lanes{}, channel, k)];
    out[k] = scale * static_cast<float>(static_cast<int8_t>(stored ^ int8_offset_bits(Lanes{})));
  }
}

inline void unpack_int8(const int8_t* quants, float scale, float* out) {
  for (int k = 0; k < kGroupSize; ++k) out[k] = scale * static_cast<float>(quants[k]);
}

}  // namespace fulcrum
