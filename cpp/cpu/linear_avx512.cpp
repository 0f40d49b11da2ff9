// Linear layers for x86-64 with AVX-512 and VNNI: 16 output channels, a tile, in the 32-bit lanes
// of a register. Here are the integer formats; the others are in linear_avx512_float.cpp. Compiled
// with ISA flags, so everything but the entry point is local to the file.
//
// vpdpbusd adds four products of unsigned weights and signed activations to 32-bit sums, exactly.
#include <cstring>

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

// What is subtracted from the sums of products with weights that are stored with an offset: kMagic
// + kOffset * sum. All are integers below 2^24, so that the difference is exact.
template <int kOffset>
inline __attribute__((always_inline)) __m512 magic_offset(const float* sum) {
  return _mm512_fmadd_ps(_mm512_set1_ps(*sum), _mm512_set1_ps(kOffset), _mm512_set1_ps(kMagic));
}

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

// What the integer formats share. A Format has: kOffset, of stored weights; kHasScales, whether
// weights have scales in every group; kHasMinimum, whether they have minima beside them, too;
// tile_bytes(K); group(tile, g), a group's quants and scales; and dot<Rows, Tiles>().
template <typename Format>
struct IntegerKernel {
  // The register blocks: Rows * Tiles sums of products and as many results, and what a step needs.
  static constexpr int kFewRows = 8, kBlockRows = 6, kBlockTiles = 2;
  static constexpr int few_tiles(int) { return 1; }
  static int64_t row_bytes(int K) { return padded_k(K); }
  static int64_t tile_bytes(int K) { return Format::tile_bytes(K); }

  // acc += scale of the row * (scale * sum of products) + minimum * total of the row. scale *
  // kMagic is exact, so that the first product is rounded once, after the subtraction of kMagic.
  template <int Rows>
  static inline __attribute__((always_inline)) void add_with_minima(const uint16_t* of_group,
                                                                    const ActivationRows& x, int g,
                                                                    const __m512i (&dots)[Rows],
                                                                    __m512 (&acc)[Rows]) {
    const __m512 scales = load_half16(of_group), minima = load_half16(of_group + kTileChannels);
    const __m512 magics = _mm512_mul_ps(scales, _mm512_set1_ps(-kMagic));
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const int index = r * x.groups + g;
      const __m512 dot = _mm512_fmadd_ps(scales, _mm512_castsi512_ps(dots[r]), magics);
      acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(x.scales[index]), dot, acc[r]);
      acc[r] = _mm512_fmadd_ps(minima, _mm512_set1_ps(x.totals[index]), acc[r]);
    }
  }

  // acc += scale of the row * scale * (sum of products - offset).
  template <int Rows, int Tiles>
  static inline __attribute__((always_inline)) void add_with_offset(
      const uint16_t* const (&scales)[Tiles], const ActivationRows& x, int g,
      const __m512i (&dots)[Tiles][Rows], __m512 (&acc)[Tiles][Rows]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const int index = r * x.groups + g;
      const __m512 scale = _mm512_set1_ps(x.scales[index]);
      const __m512 magic = magic_offset<Format::kOffset>(x.sums + index);
#pragma GCC unroll 2
      for (int j = 0; j < Tiles; ++j) {
        const __m512 dot = _mm512_sub_ps(_mm512_castsi512_ps(dots[j][r]), magic);
        if constexpr (Format::kHasScales) {
          acc[j][r] = _mm512_fmadd_ps(_mm512_mul_ps(load_half16(scales[j]), scale), dot, acc[j][r]);
        } else {
          acc[j][r] = _mm512_fmadd_ps(scale, dot, acc[j][r]);
        }
      }
    }
  }

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
      const uint16_t* scales[Tiles];  // then the minima
      __m512i dots[Tiles][Rows];
#pragma GCC unroll 2
      for (int j = 0; j < Tiles; ++j) {
        Format::group(data + j * tile_stride, g, &quants[j], &scales[j]);
        prefetch<Format::kGroupBytes>(quants[j] + ahead);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) dots[j][r] = magic_bits();
      }
      Format::template dot<Rows, Tiles>(quants, x.quantized + g * kGroupSize, x.stride, dots);
      if constexpr (Format::kHasMinimum) {
#pragma GCC unroll 2
        for (int j = 0; j < Tiles; ++j) add_with_minima<Rows>(scales[j], x, g, dots[j], acc[j]);
      } else {
        add_with_offset<Rows, Tiles>(scales, x, g, dots, acc);
      }
    }
    if constexpr (!Format::kHasScales) {
#pragma GCC unroll 2
      for (int j = 0; j < Tiles; ++j) {
        const __m512 scales = _mm512_loadu_ps(
            reinterpret_cast<const Int8ChannelTile*>(data + j * tile_stride)->scales);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[j][r] = _mm512_mul_ps(acc[j][r], scales);
      }
    }
    store_tiles<Rows, Tiles>(out, acc);
  }
};

template <int kGroups, bool kMinimum>
struct Int4Format {
  using Tile = Int4Tile<kGroups, kMinimum>;
  static constexpr int kOffset = kMinimum ? 0 : kInt4ZeroPoint;
  static constexpr bool kHasScales = true, kHasMinimum = kMinimum;
  static constexpr size_t kGroupBytes = sizeof(Tile) / kGroups;
  static int64_t tile_bytes(int K) { return int4_bytes<Tile, kGroups>(K); }

  static void group(const uint8_t* tile, int g, const uint8_t** quants, const uint16_t** scales) {
    const Tile& groups = reinterpret_cast<const Tile*>(tile)[g / kGroups];
    *quants = groups.quants[g % kGroups];
    *scales = groups.scales[0];
  }

  template <int Rows, int Tiles>
  static void dot(const uint8_t* const (&quants)[Tiles], const int8_t* activations, int64_t stride,
                  __m512i (&dots)[Tiles][Rows]) {
    dot_nibbles<Rows, Tiles>(quants, activations, stride, dots);
  }
};

struct Int8Format {
  static constexpr int kOffset = 128;
  static constexpr bool kHasScales = true, kHasMinimum = false;
  static constexpr size_t kGroupBytes = sizeof(Int8Tile);
  static int64_t tile_bytes(int K) { return num_groups(K) * int64_t{sizeof(Int8Tile)}; }

  static void group(const uint8_t* tile, int g, const uint8_t** quants, const uint16_t** scales) {
    const Int8Tile& of_group = reinterpret_cast<const Int8Tile*>(tile)[g];
    *quants = of_group.quants;
    *scales = of_group.scales;
  }

  template <int Rows, int Tiles>
  static void dot(const uint8_t* const (&quants)[Tiles], const int8_t* activations, int64_t stride,
                  __m512i (&dots)[Tiles][Rows]) {
    dot_bytes<Rows, Tiles>(quants, activations, stride, dots);
  }
};

// The scales are those of the tile, by which results are multiplied at the end.
struct Int8ChannelFormat : Int8Format {
  static constexpr bool kHasScales = false;
  static constexpr size_t kGroupBytes = sizeof(Int8Quants);
  static int64_t tile_bytes(int K) {
    return sizeof(Int8ChannelTile) + num_groups(K) * int64_t{sizeof(Int8Quants)};
  }

  static void group(const uint8_t* tile, int g, const uint8_t** quants, const uint16_t** scales) {
    const uint8_t* groups = tile + sizeof(Int8ChannelTile);
    *quants = reinterpret_cast<const Int8Quants*>(groups)[g].quants;
    *scales = nullptr;
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
      return gemm_tiles<IntegerKernel<Int8Format>>(w, x, T, y, ld_y, tile_begin, tile_end,
                                                   accumulate);
    case Format::kInt8Channel:
      return gemm_tiles<IntegerKernel<Int8ChannelFormat>>(w, x, T, y, ld_y, tile_begin, tile_end,
                                                          accumulate);
    default:
      return with_int4(w.format, [&]<int kGroups, bool kHasMinimum>() {
        gemm_tiles<IntegerKernel<Int4Format<kGroups, kHasMinimum>>>(w, x, T, y, ld_y, tile_begin,
                                                                    tile_end, accumulate);
      });
  }
}

}  // namespace fulcrum
