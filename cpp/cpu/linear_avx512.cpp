// Linear layers for x86-64 with AVX-512 and VNNI: 16 output channels, a tile, in the 32-bit lanes
// of a register. Here are the integer formats; the others are in linear_avx512_float.cpp. Compiled
// with ISA flags, so everything but the entry point is local to the file.
//
// vpdpbusd adds four products of unsigned weights and signed activations to 32-bit sums, exactly.
#include <cstring>
#include <type_traits>

#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"
#include "cpu/tile_avx512.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

__m512 load_half16(const uint16_t* values) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

__m512i broadcast_four(const int8_t* values) {
  int32_t four;
  std::memcpy(&four, values, 4);
  return _mm512_set1_epi32(four);
}

// Sums of products are kept as the bits of the float 1.5 * 2^23 + sum, which needs no conversion:
// |sum| of a group is below 2^22.
constexpr float kMagic = 12582912.0f;

__m512i magic_bits() { return _mm512_castps_si512(_mm512_set1_ps(kMagic)); }

// Four k of Tiles tiles times those of each row. stride: between rows.
template <int Rows, int Tiles>
inline __attribute__((always_inline)) void dot_step(const __m512i (&bytes)[Tiles],
                                                    const int8_t* activations, int64_t stride,
                                                    __m512i (&dots)[Tiles][Rows]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const __m512i four = broadcast_four(activations + r * stride);
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) dots[j][r] = _mm512_dpbusd_epi32(dots[j][r], bytes[j], four);
  }
}

// A step of 64 bytes of a group: in the low nibbles step i, in the high ones step i + 4.
template <int Rows, int Tiles>
inline __attribute__((always_inline)) void dot_nibbles(const uint8_t* const (&quants)[Tiles],
                                                       const int8_t* activations, int64_t stride,
                                                       __m512i (&dots)[Tiles][Rows]) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i bytes[Tiles];
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) {
      bytes[j] = _mm512_and_si512(_mm512_loadu_si512(quants[j] + i * 64), mask);
    }
    dot_step<Rows, Tiles>(bytes, activations + i * 4, stride, dots);
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) {
      bytes[j] =
          _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(quants[j] + i * 64), 4), mask);
    }
    dot_step<Rows, Tiles>(bytes, activations + 16 + i * 4, stride, dots);
  }
}

template <int Rows, int Tiles>
inline __attribute__((always_inline)) void dot_bytes(const uint8_t* const (&quants)[Tiles],
                                                     const int8_t* activations, int64_t stride,
                                                     __m512i (&dots)[Tiles][Rows]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    __m512i bytes[Tiles];
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) bytes[j] = _mm512_loadu_si512(quants[j] + i * 64);
    dot_step<Rows, Tiles>(bytes, activations + i * 4, stride, dots);
  }
}

// kMagic + offset * sum: what is subtracted from the sums of products with weights that are stored
// with an offset. All are integers below 2^24, so that the difference is exact.
inline __attribute__((always_inline)) __m512 magic_offset(float offset, float sum) {
  return _mm512_fmadd_ps(_mm512_set1_ps(sum), _mm512_set1_ps(offset), _mm512_set1_ps(kMagic));
}

// The int8 activations that a run reads.
struct ActivationRows {
  ActivationRows(const Activations& x, int K, int t)
      : groups(num_groups(K)),
        stride(int64_t{groups} * kGroupSize),
        quantized(x.quantized + t * stride),
        scales(x.scales + int64_t{t} * groups),
        sums(x.sums + int64_t{t} * groups),
        totals(x.totals + int64_t{t} * groups) {}
  int groups;
  int64_t stride;
  const int8_t* quantized;
  const float* scales;
  const float* sums;
  const float* totals;
};

template <int Rows, int Tiles>
inline __attribute__((always_inline)) void store_tiles(const TileOutput& out,
                                                       const __m512 (&values)[Tiles][Rows]) {
#pragma GCC unroll 2
  for (int j = 0; j < Tiles; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      store_row(out.y + r * out.ld_y + j * kTileChannels, out.channels - j * kTileChannels,
                out.accumulate, values[j][r]);
    }
  }
}

// The register blocks: Rows * Tiles sums of products and as many results, and what a step needs.
struct IntegerBlocks {
  static constexpr int kFewRows = 8, kBlockRows = 6, kBlockTiles = 2;
  static constexpr int few_tiles(int) { return 1; }
  static int64_t row_bytes(int K) { return padded_k(K); }
};

template <int kGroups, bool kHasMinimum>
struct Int4Kernel : IntegerBlocks {
  using Tile = Int4Tile<kGroups, kHasMinimum>;
  static int64_t tile_bytes(int K) { return int4_bytes<Tile, kGroups>(K); }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& activations, int t,
                  const TileOutput& out) {
    const ActivationRows x(activations, K, t);
    const int64_t tile_stride = tile_bytes(K);
    const int64_t ahead = kStreams ? kStreamDistanceBytes : Tiles * tile_stride;
    __m512 acc[Tiles][Rows];
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[j][r] = _mm512_setzero_ps();
    }
    for (int g = 0; g < x.groups; ++g) {
      const uint8_t* quants[Tiles];
      const Tile* tiles[Tiles];
      __m512i dots[Tiles][Rows];
#pragma GCC unroll 2
      for (int j = 0; j < Tiles; ++j) {
        tiles[j] = reinterpret_cast<const Tile*>(data + j * tile_stride) + g / kGroups;
        quants[j] = tiles[j]->quants[g % kGroups];
        prefetch<sizeof(Tile) / kGroups>(quants[j] + ahead);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) dots[j][r] = magic_bits();
      }
      dot_nibbles<Rows, Tiles>(quants, x.quantized + g * kGroupSize, x.stride, dots);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const int index = r * x.groups + g;
        const __m512 scale = _mm512_set1_ps(x.scales[index]);
        const __m512 magic =
            kHasMinimum ? _mm512_set1_ps(kMagic) : magic_offset(kInt4ZeroPoint, x.sums[index]);
        const __m512 total = _mm512_set1_ps(x.totals[index]);
#pragma GCC unroll 2
        for (int j = 0; j < Tiles; ++j) {
          const __m512 dot = _mm512_sub_ps(_mm512_castsi512_ps(dots[j][r]), magic);
          acc[j][r] = _mm512_fmadd_ps(load_half16(tiles[j]->scales[0]), _mm512_mul_ps(scale, dot),
                                      acc[j][r]);
          if constexpr (kHasMinimum) {
            acc[j][r] = _mm512_fmadd_ps(load_half16(tiles[j]->scales[1]), total, acc[j][r]);
          }
        }
      }
    }
    store_tiles<Rows, Tiles>(out, acc);
  }
};

// Quants: Int8Tile, where each group has its scales, or Int8Quants, where the tile has some.
template <typename Quants>
struct Int8Kernel : IntegerBlocks {
  static constexpr bool kPerChannel = std::is_same_v<Quants, Int8Quants>;
  static constexpr int64_t kHeaderBytes = kPerChannel ? sizeof(Int8ChannelTile) : 0;
  static int64_t tile_bytes(int K) {
    return kHeaderBytes + num_groups(K) * int64_t{sizeof(Quants)};
  }

  static __m512 factor(const Int8Tile& tile, __m512 scale) {
    return _mm512_mul_ps(load_half16(tile.scales), scale);
  }
  static __m512 factor(const Int8Quants&, __m512 scale) { return scale; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& activations, int t,
                  const TileOutput& out) {
    const ActivationRows x(activations, K, t);
    const int64_t tile_stride = tile_bytes(K);
    const int64_t ahead = kStreams ? kStreamDistanceBytes : Tiles * tile_stride;
    __m512 acc[Tiles][Rows];
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[j][r] = _mm512_setzero_ps();
    }
    for (int g = 0; g < x.groups; ++g) {
      const Quants* tiles[Tiles];
      const uint8_t* quants[Tiles];
      __m512i dots[Tiles][Rows];
#pragma GCC unroll 2
      for (int j = 0; j < Tiles; ++j) {
        tiles[j] = reinterpret_cast<const Quants*>(data + j * tile_stride + kHeaderBytes) + g;
        quants[j] = tiles[j]->quants;
        prefetch<sizeof(Quants)>(quants[j] + ahead);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) dots[j][r] = magic_bits();
      }
      dot_bytes<Rows, Tiles>(quants, x.quantized + g * kGroupSize, x.stride, dots);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const int index = r * x.groups + g;
        const __m512 scale = _mm512_set1_ps(x.scales[index]);
        const __m512 magic = magic_offset(128.0f, x.sums[index]);
#pragma GCC unroll 2
        for (int j = 0; j < Tiles; ++j) {
          const __m512 dot = _mm512_sub_ps(_mm512_castsi512_ps(dots[j][r]), magic);
          acc[j][r] = _mm512_fmadd_ps(factor(*tiles[j], scale), dot, acc[j][r]);
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < Tiles && kPerChannel; ++j) {
      const float* scales = reinterpret_cast<const float*>(data + j * tile_stride);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[j][r] = _mm512_mul_ps(acc[j][r], _mm512_loadu_ps(scales));
    }
    store_tiles<Rows, Tiles>(out, acc);
  }
};

}  // namespace

void gemm_avx512(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                 int tile_begin, int tile_end, bool accumulate) {
  switch (w.format) {
    case Format::kBf16:
    case Format::kFp8:
      return gemm_float_avx512(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kInt8:
      return gemm_tiles<Int8Kernel<Int8Tile>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kInt8Channel:
      return gemm_tiles<Int8Kernel<Int8Quants>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    default:
      return with_int4(w.format, [&]<int kGroups, bool kHasMinimum>() {
        gemm_tiles<Int4Kernel<kGroups, kHasMinimum>>(w, x, T, y, ld_y, tile_begin, tile_end,
                                                     accumulate);
      });
  }
}

}  // namespace fulcrum
