// The shape that the packed layouts of the vector instruction sets share: a tile is 16 output
// channels, stored group after group of K, so that a kernel reads one ascending stream. Where a
// weight lies inside a group differs with the width of the registers and is a template argument
// of the packing code (`Lanes`). Headers of formats/ declare data and layouts; the functions in
// them are for files compiled without ISA flags only.
#pragma once

#include <cstdint>

namespace fulcrum {

constexpr int kTileChannels = 16;

struct Lanes256 {};                  // AVX2: 8 lanes of 32 bits, a tile is two halves of 8 channels
struct Lanes512 {};                  // AVX-512: 16 lanes of 32 bits, a tile is one register
struct Lanes512Pairs : Lanes512 {};  // AVX512-BF16: of the float formats a lane holds two k

// Tiles of the float formats are rows of 16 values, one for each k. In Lanes512Pairs two rows are
// the 16 lanes of vdpbf16ps, and a last row alone is followed by one of zeros.
static constexpr int64_t num_tile_rows(Lanes256, int K) { return K; }
static constexpr int64_t num_tile_rows(Lanes512, int K) { return K; }
static constexpr int64_t num_tile_rows(Lanes512Pairs, int K) { return int64_t{K} + K % 2; }

struct TilePlace {
  int row;
  int slot;
};

inline TilePlace place_in_order(int channel, int k) { return {k, channel}; }
inline TilePlace place_in_pairs(int channel, int k) {
  const int from_pair = channel * 2 + k % 2;
  return {k / 2 * 2 + from_pair / kTileChannels, from_pair % kTileChannels};
}

}  // namespace fulcrum
