// The tables of linear kernels: joins each instruction set's arithmetic with the code that packs
// and decodes the layout it reads. That code is portable, so that any machine can pack for any
// instruction set. Called at load.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/linear_isa.h"
#include "formats/bf16.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

int tile_channels(Format) { return kTileChannels; }

int num_tiles(int N) { return (N + kTileChannels - 1) / kTileChannels; }

struct PortableLayout {};

template <typename Layout>
size_t packed_bytes(Format format, int N, int K) {
  constexpr bool kTiled = !std::is_same_v<Layout, PortableLayout>;
  const size_t tiles = num_tiles(N), groups = num_groups(K), rows = N;
  switch (format) {
    case Format::kBf16:
      return tiles * K * sizeof(Bf16TileRow);
    case Format::kInt8:
      return kTiled ? tiles * groups * sizeof(Int8Tile) : rows * groups * sizeof(Int8Group);
    case Format::kInt4:
      return kTiled ? tiles * groups * sizeof(Int4Tile) : rows * groups * sizeof(Int4Group);
  }
  return 0;
}

// First tile element (Bf16TileRow, Int8Tile or Int4Tile) of the tile that holds a row.
template <typename Tile, typename Byte>
auto tile_of(Byte* data, int row, int elements) {
  using Pointer = std::conditional_t<std::is_const_v<Byte>, const Tile*, Tile*>;
  return reinterpret_cast<Pointer>(data) + int64_t{row / kTileChannels} * elements;
}

// Zeroes the tiles that rows [row_begin, row_end) begin, so that channels beyond N are zero and
// nibbles can be set by or.
template <typename Tile>
void clear_tiles(int row_begin, int row_end, int elements, uint8_t* out) {
  Tile* begin = tile_of<Tile>(out, row_begin, elements);
  const size_t count = size_t(num_tiles(row_end) - row_begin / kTileChannels) * elements;
  std::memset(static_cast<void*>(begin), 0, count * sizeof(Tile));
}

template <typename Lanes>
void pack_tiles(Format format, int, int K, int row_begin, int row_end, const float* values,
                const uint8_t* quants, const float* scales, const float* minima, uint8_t* out) {
  const int groups = num_groups(K);
  if (format == Format::kBf16) {
    clear_tiles<Bf16TileRow>(row_begin, row_end, K, out);
    for (int n = row_begin; n < row_end; ++n, values += K) {
      pack_bf16<Lanes>(values, K, n % kTileChannels, tile_of<Bf16TileRow>(out, n, K));
    }
    return;
  }
  const bool is_int8 = format == Format::kInt8;
  if (is_int8) {
    clear_tiles<Int8Tile>(row_begin, row_end, groups, out);
  } else {
    clear_tiles<Int4Tile>(row_begin, row_end, groups, out);
  }
  for (int n = row_begin; n < row_end; ++n) {
    const int channel = n % kTileChannels;
    for (int g = 0; g < groups; ++g, quants += kGroupSize, ++scales) {
      if (is_int8) {
        pack_int8<Lanes>(quants, *scales, channel, tile_of<Int8Tile>(out, n, groups) + g);
      } else {
        pack_int4<Lanes>(quants, *scales, *minima++, channel,
                         tile_of<Int4Tile>(out, n, groups) + g);
      }
    }
  }
}

void pack_portable(Format format, int N, int K, int row_begin, int row_end, const float* values,
                   const uint8_t* quants, const float* scales, const float* minima, uint8_t* out) {
  if (format == Format::kBf16) {
    return pack_tiles<Lanes512>(format, N, K, row_begin, row_end, values, quants, scales, minima,
                                out);
  }
  const int64_t begin = int64_t{row_begin} * num_groups(K);
  const int64_t count = int64_t{row_end - row_begin} * num_groups(K);
  for (int64_t i = 0; i < count; ++i, quants += kGroupSize) {
    if (format == Format::kInt8) {
      pack_int8_group(quants, scales[i], reinterpret_cast<Int8Group*>(out) + begin + i);
    } else {
      pack_int4_group(quants, scales[i], minima[i], reinterpret_cast<Int4Group*>(out) + begin + i);
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

template <typename Lanes>
void unpack_row_tiles(const PackedMatrix& w, int row, float* out) {
  const int channel = row % kTileChannels;
  const int groups = num_groups(w.K);
  switch (w.format) {
    case Format::kBf16:
      return unpack_bf16<Lanes>(tile_of<Bf16TileRow>(w.data, row, w.K), w.K, channel, out);
    case Format::kInt8: {
      const Int8Tile* tile = tile_of<Int8Tile>(w.data, row, groups);
      return unpack_groups(w.K, out,
                           [=](int g, float* to) { unpack_int8<Lanes>(tile[g], channel, to); });
    }
    case Format::kInt4: {
      const Int4Tile* tile = tile_of<Int4Tile>(w.data, row, groups);
      return unpack_groups(w.K, out,
                           [=](int g, float* to) { unpack_int4<Lanes>(tile[g], channel, to); });
    }
  }
}

void unpack_row_portable(const PackedMatrix& w, int row, float* out) {
  const int64_t begin = int64_t{row} * num_groups(w.K);
  switch (w.format) {
    case Format::kBf16:
      return unpack_row_tiles<Lanes512>(w, row, out);
    case Format::kInt8: {
      const Int8Group* groups = reinterpret_cast<const Int8Group*>(w.data) + begin;
      return unpack_groups(w.K, out, [=](int g, float* to) { unpack_int8_group(groups[g], to); });
    }
    case Format::kInt4: {
      const Int4Group* groups = reinterpret_cast<const Int4Group*>(w.data) + begin;
      return unpack_groups(w.K, out, [=](int g, float* to) { unpack_int4_group(groups[g], to); });
    }
  }
}

constexpr LinearKernels kPortable = {
    "portable",
    false,
    tile_channels,
    packed_bytes<PortableLayout>,
    pack_portable,
    unpack_row_portable,
    quantize_rows_portable,
    gemm_portable,
};

#if defined(__x86_64__)
constexpr LinearKernels kAvx2 = {
    "avx2",
    true,
    tile_channels,
    packed_bytes<Lanes256>,
    pack_tiles<Lanes256>,
    unpack_row_tiles<Lanes256>,
    quantize_rows_avx2,
    gemm_avx2,
};

constexpr LinearKernels kAvx512 = {
    "avx512",
    false,
    tile_channels,
    packed_bytes<Lanes512>,
    pack_tiles<Lanes512>,
    unpack_row_tiles<Lanes512>,
    quantize_rows_avx2,
    gemm_avx512,
};
#endif

}  // namespace

const LinearKernels* linear_kernels(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return &kAvx2;
  if (std::strcmp(isa, "avx512") == 0) return &kAvx512;
#endif
  return std::strcmp(isa, "portable") == 0 ? &kPortable : nullptr;
}

}  // namespace fulcrum
