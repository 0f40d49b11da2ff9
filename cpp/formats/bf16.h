// Format bf16: the upper 16 bits of a float, without scales. Exact for checkpoints in bf16, and
// the reference that the integer formats are measured against.
//
// Tile layout, portable code included: for every k, the 16 channels of a tile side by side (32
// bytes), K rows of them, channels beyond N zero. Kernels multiply them by one broadcast
// activation, which gives every output its own lane and its own chain of additions in ascending k.
// In Lanes256 the channels i and i + 8 share a 32-bit lane, low and high half: one load then gives
// two registers of floats by a shift and a mask, without any shuffle. In Lanes512 they are in
// order, for vpmovzxwd and for loops that a compiler vectorises. In Lanes512Pairs a 32-bit lane
// holds two consecutive k of its channel, the operand of vdpbf16ps, which rounds activations to
// bf16 and takes subnormal values as zero.
#pragma once

#include <cstdint>

#include "formats/float16.h"
#include "formats/tile.h"

namespace fulcrum {

struct Bf16TileRow {
  uint16_t values[kTileChannels];
};
static_assert(sizeof(Bf16TileRow) == 32);

inline TilePlace bf16_place(Lanes256, int channel, int k) {
  return {k, channel % 8 * 2 + channel / 8};
}
inline TilePlace bf16_place(Lanes512, int channel, int k) { return place_in_order(channel, k); }
inline TilePlace bf16_place(Lanes512Pairs, int channel, int k) {
  return place_in_pairs(channel, k);
}

// Packs one row of K floats as channel `channel` of a tile.
template <typename Lanes>
void pack_bf16(const float* values, int K, int channel, Bf16TileRow* tile) {
  for (int k = 0; k < K; ++k) {
    const TilePlace place = bf16_place(Lanes{}, channel, k);
    tile[place.row].values[place.slot] = float_to_bf16(values[k]);
  }
}

template <typename Lanes>
void unpack_bf16(const Bf16TileRow* tile, int K, int channel, float* out) {
  for (int k = 0; k < K; ++k) {
    const TilePlace place = bf16_place(Lanes{}, channel, k);
    out[k] = bf16_to_float(tile[place.row].values[place.slot]);
  }
}

}  // namespace fulcrum
