// Format int4: one or more groups of 32 weights along K share an fp16 scale and, unless the format
// is symmetric, an fp16 minimum. w = scale * q + minimum, or scale * (q - 8); q in 0…15.
// int4 is exact for Q4_0 and Q4_1, int4-sym for Q4_0.
//   bits a weight, groups of 32 / 64 / 128: 5 / 4.5 / 4.25, symmetric 4.5 / 4.25 / 4.125
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/float16.h"
#include "formats/formats.h"
#include "formats/tile.h"
#include "linear.h"

namespace fulcrum {

constexpr int kInt4ZeroPoint = 8;  // of the symmetric formats

// Scale groups of a row, each of kGroups groups of 32; the last one may be cut short by K.
template <int kGroups>
static constexpr int num_scales(int K) {
  return (num_groups(K) + kGroups - 1) / kGroups;
}

// Portable layout: a row is its groups in order; byte i of 16 holds k = i (low nibble) and k + 16.
template <int kGroups, bool kHasMinimum>
struct Int4Group {
  uint16_t scale[kHasMinimum ? 2 : 1];  // then the minimum
  uint8_t quants[kGroups][kGroupSize / 2];
};
static_assert(sizeof(Int4Group<1, true>) == 20 && sizeof(Int4Group<4, false>) == 66);

// Tile layout: a group of 16 channels: all that a kernel needs of it, side by side. Once unpacked,
// four consecutive k of a channel fill a 32-bit lane. The low and the high nibbles of a load are
// the operands of two dot products, by a mask and a shift:
// Lanes256: 8 steps of four k, 32 bytes each; low nibbles channels 0…7, high ones 8…15.
// Lanes512: 4 rows of 64 bytes; row i holds step i in the low nibbles, step i + 4 in the high ones.
template <int kGroups, bool kHasMinimum>
struct Int4Tile {
  uint16_t scales[kHasMinimum ? 2 : 1][kTileChannels];  // then the minima
  uint8_t quants[kGroups][kTileChannels * kGroupSize / 2];
};
static_assert(sizeof(Int4Tile<1, true>) == 320 && sizeof(Int4Tile<2, false>) == 544);

// Bytes of K weights as Units, Int4Tile or Int4Group: of the last one only the groups that there
// are, since a gap would break the stream that the hardware follows.
template <typename Unit, int kGroups>
static constexpr int64_t int4_bytes(int K) {
  constexpr int64_t kGroupBytes = sizeof(Unit::quants[0]);
  return num_scales<kGroups>(K) * (sizeof(Unit) - kGroups * kGroupBytes) +
         num_groups(K) * kGroupBytes;
}

// Calls op<kGroups, kHasMinimum>() for one of the int4 formats.
template <typename Op>
auto with_int4(Format format, Op op) {
  switch (format) {
    case Format::kInt4G64:
      return op.template operator()<2, true>();
    case Format::kInt4G128:
      return op.template operator()<4, true>();
    case Format::kInt4Symmetric:
      return op.template operator()<1, false>();
    case Format::kInt4SymmetricG64:
      return op.template operator()<2, false>();
    case Format::kInt4SymmetricG128:
      return op.template operator()<4, false>();
    default:
      return op.template operator()<1, true>();
  }
}

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

// Packs 32 quants of one channel. The nibbles of the tile must be zero.
template <typename Lanes>
void pack_int4(const uint8_t* quants, int channel, uint8_t* tile_quants) {
  for (int k = 0; k < kGroupSize; k += 4) {
    const NibblePlace place = int4_place(Lanes{}, channel, k);
    uint32_t four, stored;
    std::memcpy(&four, quants + k, 4);
    std::memcpy(&stored, tile_quants + place.offset, 4);
    stored |= four << place.shift;
    std::memcpy(tile_quants + place.offset, &stored, 4);
  }
}

template <typename Lanes>
void unpack_int4(const uint8_t* tile_quants, int channel, uint8_t* quants) {
  for (int k = 0; k < kGroupSize; ++k) {
    const NibblePlace place = int4_place(Lanes{}, channel, k);
    quants[k] = tile_quants[place.offset + k % 4] >> place.shift & 15;
  }
}

// The portable layout, 32 quants.
inline void pack_int4(const uint8_t* quants, uint8_t* bytes) {
  for (int i = 0; i < kGroupSize / 2; ++i) {
    bytes[i] = static_cast<uint8_t>(quants[i] | quants[i + kGroupSize / 2] << 4);
  }
}

inline void unpack_int4(const uint8_t* bytes, uint8_t* quants) {
  for (int i = 0; i < kGroupSize / 2; ++i) {
    quants[i] = bytes[i] & 15;
    quants[i + kGroupSize / 2] = bytes[i] >> 4;
  }
}

inline void decode_int4(const uint8_t* quants, float scale, float minimum, float* out) {
  for (int k = 0; k < kGroupSize; ++k) out[k] = scale * static_cast<float>(quants[k]) + minimum;
}

}  // namespace fulcrum
