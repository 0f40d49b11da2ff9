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

// dot += bytes of the tile times four activations of each of the rows. stride: between rows.
template <int Rows>
inline __attribute__((always_inline)) void dot_step(__m512i bytes, const int8_t* activations,
                                                    int64_t stride, __m512i (&dots)[Rows]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    dots[r] = _mm512_dpbusd_epi32(dots[r], bytes, broadcast_four(activations + r * stride));
  }
}

// Channel sums of 32 products. dots: two chains, so that few rows do not wait for the latency.
template <int Rows>
inline __attribute__((always_inline)) void dot_nibbles(const uint8_t* quants,
                                                       const int8_t* activations, int64_t stride,
                                                       __m512i (&dots)[2][Rows]) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) dots[0][r] = dots[1][r] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i bytes = _mm512_loadu_si512(quants + i * 64);
    dot_step<Rows>(_mm512_and_si512(bytes, mask), activations + i * 4, stride, dots[0]);
    dot_step<Rows>(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask), activations + 16 + i * 4,
                   stride, dots[1]);
  }
}

template <int Rows>
inline __attribute__((always_inline)) void dot_bytes(const uint8_t* quants,
                                                     const int8_t* activations, int64_t stride,
                                                     __m512i (&dots)[2][Rows]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) dots[0][r] = dots[1][r] = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    dot_step<Rows>(_mm512_loadu_si512(quants + i * 64), activations + i * 4, stride, dots[i % 2]);
  }
}

// dot - offset * sum, where both are integers below 2^24, so that their difference is exact.
template <int Rows>
inline __attribute__((always_inline)) __m512 shifted_dot(const __m512i (&dots)[2][Rows], int r,
                                                         float offset, float sum) {
  const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[0][r], dots[1][r]));
  return _mm512_sub_ps(dot, _mm512_set1_ps(offset * sum));
}

template <int Rows>
inline __attribute__((always_inline)) void store_rows(const TileOutput& out,
                                                      const __m512 (&values)[Rows]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    store_row(out.y + r * out.ld_y, out.channels, out.accumulate, values[r]);
  }
}

template <int kGroups, bool kHasMinimum>
struct Int4Kernel {
  using Tile = Int4Tile<kGroups, kHasMinimum>;
  static constexpr int kRows = 8;
  static constexpr bool kPairsTiles = false;
  static int64_t tile_bytes(int K) { return int4_bytes<Tile, kGroups>(K); }
  static int64_t row_bytes(int K) { return padded_k(K); }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const Tile* tile = reinterpret_cast<const Tile*>(data);
    const int64_t next = tile_bytes(K);
    const int groups = num_groups(K), scale_groups = num_scales<kGroups>(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int8_t* activations = x.quantized + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    const float* sums = x.sums + int64_t{t} * groups;
    __m512 acc[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = _mm512_setzero_ps();
    for (int i = 0; i < scale_groups; ++i, ++tile) {
      if (!kStreams) prefetch<sizeof(Tile)>(reinterpret_cast<const char*>(tile) + next);
      // Of the groups that share a scale: products with the activations, and their sums.
      __m512 products[Rows], totals[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) products[r] = totals[r] = _mm512_setzero_ps();
      for (int g = i * kGroups; g < (i + 1) * kGroups && (kGroups == 1 || g < groups); ++g) {
        __m512i dots[2][Rows];
        dot_nibbles<Rows>(tile->quants[g - i * kGroups], activations + g * kGroupSize, stride,
                          dots);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const int index = r * groups + g;
          const __m512 scale = _mm512_set1_ps(scales[index]);
          const float offset = kHasMinimum ? 0.0f : kInt4ZeroPoint;
          const __m512 dot = shifted_dot(dots, r, offset, sums[index]);
          products[r] = _mm512_fmadd_ps(scale, dot, products[r]);
          totals[r] = _mm512_fmadd_ps(scale, _mm512_set1_ps(sums[index]), totals[r]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        acc[r] = _mm512_fmadd_ps(load_half16(tile->scales[0]), products[r], acc[r]);
        if constexpr (kHasMinimum) {
          acc[r] = _mm512_fmadd_ps(load_half16(tile->scales[1]), totals[r], acc[r]);
        }
      }
    }
    store_rows<Rows>(out, acc);
  }
};

// Quants: Int8Tile, where each group has its scales, or Int8Quants, where the tile has some.
template <typename Quants>
struct Int8Kernel {
  static constexpr bool kPerChannel = std::is_same_v<Quants, Int8Quants>;
  static constexpr int kRows = 8;
  static constexpr bool kPairsTiles = false;
  static int64_t tile_bytes(int K) {
    return (kPerChannel ? sizeof(Int8ChannelTile) : 0) + num_groups(K) * int64_t{sizeof(Quants)};
  }
  static int64_t row_bytes(int K) { return padded_k(K); }

  static __m512 factor(const Int8Tile& tile, __m512 scale) {
    return _mm512_mul_ps(load_half16(tile.scales), scale);
  }
  static __m512 factor(const Int8Quants&, __m512 scale) { return scale; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const int groups = num_groups(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int8_t* activations = x.quantized + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    const float* sums = x.sums + int64_t{t} * groups;
    const float* channel_scales = reinterpret_cast<const float*>(data);
    const Quants* tile =
        reinterpret_cast<const Quants*>(data + (kPerChannel ? sizeof(Int8ChannelTile) : 0));
    __m512 acc[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if (!kStreams) prefetch<sizeof(Quants)>(tile + groups + g);
      __m512i dots[2][Rows];
      dot_bytes<Rows>(tile[g].quants, activations + g * kGroupSize, stride, dots);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const int index = r * groups + g;
        acc[r] = _mm512_fmadd_ps(factor(tile[g], _mm512_set1_ps(scales[index])),
                                 shifted_dot(dots, r, 128.0f, sums[index]), acc[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows && kPerChannel; ++r) {
      acc[r] = _mm512_mul_ps(acc[r], _mm512_loadu_ps(channel_scales));
    }
    store_rows<Rows>(out, acc);
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
