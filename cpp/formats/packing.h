// Packs rows of weights for the layout of an instruction set, and decodes them: portable code, so
// that any machine can pack for any instruction set. Included by linear.cpp only.
//
// A Layout is Lanes256, Lanes512, Lanes512Pairs or PortableLayout. Of the float formats the
// portable code reads the tiles of Lanes512.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "formats/bf16.h"
#include "formats/fp8.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

struct PortableLayout {};

template <typename Layout>
constexpr bool kTiled = !std::is_same_v<Layout, PortableLayout>;

template <typename Layout>
using FloatLanes = std::conditional_t<kTiled<Layout>, Layout, Lanes512>;

int num_tiles(int N) { return (N + kTileChannels - 1) / kTileChannels; }

template <typename Layout, int kGroups, bool kHasMinimum>
using Int4Unit = std::conditional_t<kTiled<Layout>, Int4Tile<kGroups, kHasMinimum>,
                                    Int4Group<kGroups, kHasMinimum>>;

// Bytes of a tile, or of a row where the layout has no tiles.
template <typename Layout>
int64_t unit_bytes(Format format, int K) {
  const int64_t groups = num_groups(K);
  switch (format) {
    case Format::kBf16:
      return num_tile_rows(FloatLanes<Layout>{}, K) * int64_t{sizeof(Bf16TileRow)};
    case Format::kFp8:
      return fp8_tile_bytes<FloatLanes<Layout>>(K);
    case Format::kInt8:
      return groups * int64_t{kTiled<Layout> ? sizeof(Int8Tile) : sizeof(Int8Group)};
    case Format::kInt8Channel:
      return kTiled<Layout> ? int8_channel_tile_bytes(K) : int8_channel_row_bytes(K);
    default:
      return with_int4(format, [=]<int kGroups, bool kHasMinimum>() {
        return int4_bytes<Int4Unit<Layout, kGroups, kHasMinimum>, kGroups>(K);
      });
  }
}

template <typename Layout>
bool has_tiles(Format format) {
  return kTiled<Layout> || !format_info(format).reads_integers;
}

template <typename Layout>
size_t packed_bytes(Format format, int N, int K) {
  return (has_tiles<Layout>(format) ? num_tiles(N) : N) * unit_bytes<Layout>(format, K);
}

// The tile or the row that holds row `row` of the matrix.
template <typename Layout, typename Byte>
Byte* unit_of(Format format, int K, int row, Byte* data) {
  const int unit = has_tiles<Layout>(format) ? row / kTileChannels : row;
  return data + unit * unit_bytes<Layout>(format, K);
}

// One row of the matrix in the form that LinearKernels::pack takes.
struct Row {
  const float* values;
  const uint8_t* quants;
  const float* scales;
  const float* minima;
};

template <typename Layout, int kGroups, bool kHasMinimum>
void pack_int4_row(const Row& row, int K, int channel, uint8_t* unit) {
  using Unit = Int4Unit<Layout, kGroups, kHasMinimum>;
  Unit* units = reinterpret_cast<Unit*>(unit);
  for (int g = 0; g < num_groups(K); ++g) {
    uint8_t* bytes = units[g / kGroups].quants[g % kGroups];
    if constexpr (kTiled<Layout>) {
      pack_int4<Layout>(row.quants + g * kGroupSize, channel, bytes);
    } else {
      pack_int4(row.quants + g * kGroupSize, bytes);
    }
  }
  for (int i = 0; i < num_scales<kGroups>(K); ++i) {
    const uint16_t halves[] = {float_to_half(row.scales[i]),
                               kHasMinimum ? float_to_half(row.minima[i]) : uint16_t{0}};
    for (int part = 0; part < (kHasMinimum ? 2 : 1); ++part) {
      if constexpr (kTiled<Layout>) {
        units[i].scales[part][channel] = halves[part];
      } else {
        units[i].scale[part] = halves[part];
      }
    }
  }
}

template <typename Layout>
void pack_int8_row(const Row& row, int K, int channel, uint8_t* unit) {
  for (int g = 0; g < num_groups(K); ++g) {
    const uint8_t* quants = row.quants + g * kGroupSize;
    if constexpr (kTiled<Layout>) {
      Int8Tile& tile = reinterpret_cast<Int8Tile*>(unit)[g];
      pack_int8<Layout>(quants, channel, &tile);
      tile.scales[channel] = float_to_half(row.scales[g]);
    } else {
      Int8Group& group = reinterpret_cast<Int8Group*>(unit)[g];
      std::memcpy(group.quants, quants, kGroupSize);
      group.scale = float_to_half(row.scales[g]);
    }
  }
}

template <typename Layout>
void pack_int8_channel_row(const Row& row, int K, int channel, uint8_t* unit) {
  if constexpr (kTiled<Layout>) {
    Int8ChannelTile* tile = reinterpret_cast<Int8ChannelTile*>(unit);
    tile->scales[channel] = row.scales[0];
    for (int g = 0; g < num_groups(K); ++g) {
      pack_int8<Layout>(row.quants + g * kGroupSize, channel, tile->groups() + g);
    }
  } else {
    std::memcpy(unit, row.scales, sizeof(float));
    std::memcpy(unit + sizeof(float), row.quants, padded_k(K));
  }
}

template <typename Lanes>
void pack_fp8_row(const Row& row, int K, int channel, uint8_t* unit) {
  Fp8Tile* tile = reinterpret_cast<Fp8Tile*>(unit);
  tile->scales[channel] = row.scales[0] * kFp8ToHalf;
  for (int k = 0; k < K; ++k) {
    const TilePlace place = fp8_place(Lanes{}, channel, k);
    tile->rows()[place.row].values[place.slot] = row.quants[k];
  }
}

template <typename Layout>
void pack(Format format, int, int K, int row_begin, int row_end, const float* values,
          const uint8_t* quants, const float* scales, const float* minima, uint8_t* out) {
  // Channels beyond N must be zero, and nibbles are set by or.
  uint8_t* begin = unit_of<Layout>(format, K, row_begin, out);
  std::memset(begin, 0, packed_bytes<Layout>(format, row_end - row_begin, K));
  for (int n = row_begin; n < row_end; ++n) {
    const int64_t i = n - row_begin, groups = num_groups(K);
    const Row row = {values + i * K, quants + i * padded_k(K), scales + i * groups,
                     minima + i * groups};
    const int channel = n % kTileChannels;
    uint8_t* unit = unit_of<Layout>(format, K, n, out);
    switch (format) {
      case Format::kBf16:
        pack_bf16<FloatLanes<Layout>>(row.values, K, channel, reinterpret_cast<Bf16TileRow*>(unit));
        break;
      case Format::kFp8:
        pack_fp8_row<FloatLanes<Layout>>(row, K, channel, unit);
        break;
      case Format::kInt8:
        pack_int8_row<Layout>(row, K, channel, unit);
        break;
      case Format::kInt8Channel:
        pack_int8_channel_row<Layout>(row, K, channel, unit);
        break;
      default:
        with_int4(format, [&]<int kGroups, bool kHasMinimum>() {
          pack_int4_row<Layout, kGroups, kHasMinimum>(row, K, channel, unit);
        });
    }
  }
}

// Calls decode(group index, 32 floats) for every group of a row; a last group may be cut short.
template <typename Decode>
void unpack_groups(int K, float* out, Decode decode) {
  int g = 0;
  for (; (g + 1) * kGroupSize <= K; ++g) decode(g, out + g * kGroupSize);
  if (g * kGroupSize < K) {
    float tail[kGroupSize];
    decode(g, tail);
    std::copy_n(tail, K - g * kGroupSize, out + g * kGroupSize);
  }
}

template <typename Layout, int kGroups, bool kHasMinimum>
void unpack_int4_row(const uint8_t* unit, int K, int channel, float* out) {
  using Unit = Int4Unit<Layout, kGroups, kHasMinimum>;
  unpack_groups(K, out, [=](int g, float* to) {
    const Unit& from = reinterpret_cast<const Unit*>(unit)[g / kGroups];
    const auto half = [&](int part) {
      if constexpr (kTiled<Layout>) {
        return half_to_float(from.scales[part][channel]);
      } else {
        return half_to_float(from.scale[part]);
      }
    };
    uint8_t quants[kGroupSize];
    if constexpr (kTiled<Layout>) {
      unpack_int4<Layout>(from.quants[g % kGroups], channel, quants);
    } else {
      unpack_int4(from.quants[g % kGroups], quants);
    }
    const float scale = half(0);
    decode_int4(quants, scale, kHasMinimum ? half(kHasMinimum) : -kInt4ZeroPoint * scale, to);
  });
}

template <typename Layout>
void unpack_int8_row(const uint8_t* unit, int K, int channel, float* out) {
  unpack_groups(K, out, [=](int g, float* to) {
    if constexpr (kTiled<Layout>) {
      const Int8Tile& tile = reinterpret_cast<const Int8Tile*>(unit)[g];
      unpack_int8<Layout>(tile, half_to_float(tile.scales[channel]), channel, to);
    } else {
      const Int8Group& group = reinterpret_cast<const Int8Group*>(unit)[g];
      unpack_int8(group.quants, half_to_float(group.scale), to);
    }
  });
}

template <typename Layout>
void unpack_int8_channel_row(const uint8_t* unit, int K, int channel, float* out) {
  unpack_groups(K, out, [=](int g, float* to) {
    if constexpr (kTiled<Layout>) {
      const Int8ChannelTile* tile = reinterpret_cast<const Int8ChannelTile*>(unit);
      unpack_int8<Layout>(tile->groups()[g], tile->scales[channel], channel, to);
    } else {
      float scale;
      std::memcpy(&scale, unit, sizeof(float));
      const uint8_t* quants = unit + sizeof(float) + g * kGroupSize;
      unpack_int8(reinterpret_cast<const int8_t*>(quants), scale, to);
    }
  });
}

template <typename Lanes>
void unpack_fp8_row(const uint8_t* unit, int K, int channel, float* out) {
  const Fp8Tile* tile = reinterpret_cast<const Fp8Tile*>(unit);
  for (int k = 0; k < K; ++k) {
    const TilePlace place = fp8_place(Lanes{}, channel, k);
    out[k] = e4m3_to_half_scale(tile->rows()[place.row].values[place.slot]) * tile->scales[channel];
  }
}

template <typename Layout>
void unpack_row(const PackedMatrix& w, int row, float* out) {
  const int channel = row % kTileChannels;
  const uint8_t* unit = unit_of<Layout>(w.format, w.K, row, w.data);
  switch (w.format) {
    case Format::kBf16:
      return unpack_bf16<FloatLanes<Layout>>(reinterpret_cast<const Bf16TileRow*>(unit), w.K,
                                             channel, out);
    case Format::kFp8:
      return unpack_fp8_row<FloatLanes<Layout>>(unit, w.K, channel, out);
    case Format::kInt8:
      return unpack_int8_row<Layout>(unit, w.K, channel, out);
    case Format::kInt8Channel:
      return unpack_int8_channel_row<Layout>(unit, w.K, channel, out);
    default:
      return with_int4(w.format, [=, K = w.K]<int kGroups, bool kHasMinimum>() {
        unpack_int4_row<Layout, kGroups, kHasMinimum>(unit, K, channel, out);
      });
  }
}

}  // namespace
}  // namespace fulcrum
