// Linear layers for x86-64 with AVX-512 and VNNI: 16 output channels, a tile, in the 32-bit lanes
// of a register. Compiled with ISA flags, so everything but the entry point is local to the file.
//
// vpdpbusd adds four products of unsigned weights and signed activations to 32-bit sums, exactly.
// bf16 weights are widened and multiplied in float: vdpbf16ps would round the activations.
#if defined(FULCRUM_EMULATED_INTRINSICS)
#include FULCRUM_EMULATED_INTRINSICS  // lets a test run this file on any machine
#else
#include <immintrin.h>
#endif

#include <cstring>

#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"
#include "formats/bf16.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

// Writes one row of a tile, of which `channels` (16 or fewer) exist.
void store_row(float* y, int channels, bool accumulate, __m512 values) {
  if (channels >= kTileChannels) {
    _mm512_storeu_ps(y, accumulate ? _mm512_add_ps(_mm512_loadu_ps(y), values) : values);
    return;
  }
  float tail[kTileChannels];
  _mm512_storeu_ps(tail, values);
  for (int c = 0; c < channels; ++c) y[c] = accumulate ? y[c] + tail[c] : tail[c];
}

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

// The two integer formats: int8 is stored with an offset of 128, int4 has a minimum instead.
template <typename TileType>
struct IntKernel {
  using Tile = TileType;
  static constexpr int kRows = 8;
  static constexpr bool kPairsTiles = false;
  static int64_t tile_elements(int K) { return num_groups(K); }
  static int64_t row_bytes(int K) { return padded_k(K); }

  template <int Rows>
  static inline __attribute__((always_inline)) void dot_group(const Int4Tile& tile,
                                                              const int8_t* activations,
                                                              int64_t stride,
                                                              __m512i (&dots)[2][Rows]) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i bytes = _mm512_loadu_si512(tile.quants + i * 64);
      dot_step<Rows>(_mm512_and_si512(bytes, mask), activations + i * 4, stride, dots[0]);
      dot_step<Rows>(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask), activations + 16 + i * 4,
                     stride, dots[1]);
    }
  }

  template <int Rows>
  static inline __attribute__((always_inline)) void dot_group(const Int8Tile& tile,
                                                              const int8_t* activations,
                                                              int64_t stride,
                                                              __m512i (&dots)[2][Rows]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i bytes = _mm512_loadu_si512(tile.quants + i * 64);
      dot_step<Rows>(bytes, activations + i * 4, stride, dots[i % 2]);
    }
  }

  // acc + weight scale * activation scale * dot, and the minimum's part. Integers below 2^24 are
  // exact as floats, and so is their difference.
  static __m512 add_group(__m512 acc, const Int4Tile& tile, float scale, float sum, __m512 dot) {
    const __m512 factor = _mm512_mul_ps(load_half16(tile.scales), _mm512_set1_ps(scale));
    acc = _mm512_fmadd_ps(factor, dot, acc);
    return _mm512_fmadd_ps(load_half16(tile.minima), _mm512_set1_ps(scale * sum), acc);
  }
  static __m512 add_group(__m512 acc, const Int8Tile& tile, float scale, float sum, __m512 dot) {
    const __m512 factor = _mm512_mul_ps(load_half16(tile.scales), _mm512_set1_ps(scale));
    return _mm512_fmadd_ps(factor, _mm512_sub_ps(dot, _mm512_set1_ps(128.0f * sum)), acc);
  }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const Tile* tile, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const int groups = num_groups(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int8_t* activations = x.quantized + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    const float* sums = x.sums + int64_t{t} * groups;
    __m512 acc[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if (!kStreams) prefetch(tile[groups + g]);
      __m512i dots[2][Rows];  // two chains, so that few rows do not wait for the latency
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) dots[0][r] = dots[1][r] = _mm512_setzero_si512();
      dot_group<Rows>(tile[g], activations + g * kGroupSize, stride, dots);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[0][r], dots[1][r]));
        const int index = r * groups + g;
        acc[r] = add_group(acc[r], tile[g], scales[index], sums[index], dot);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      store_row(out.y + r * out.ld_y, out.channels, out.accumulate, acc[r]);
    }
  }
};

// One chain of fused multiply-adds per output, in ascending k.
struct Bf16Kernel {
  using Tile = Bf16TileRow;
  static constexpr int kRows = 8;
  static constexpr bool kPairsTiles = true;
  static int64_t tile_elements(int K) { return K; }
  static int64_t row_bytes(int K) { return int64_t{K} * 4; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const Bf16TileRow* tile, int K, const Activations& x, int t,
                  const TileOutput& out) {
    const float* rows = x.values + t * x.ld_values;
    __m512 acc[Tiles][Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[i][r] = _mm512_setzero_ps();
    }
    for (int k = 0; k < K; ++k) {
      // The hardware follows several tiles at once well, one tile of these not far enough.
      if (!kStreams || Tiles == 1) prefetch(tile[kStreams ? k + 96 : k + K]);
#pragma GCC unroll 4
      for (int i = 0; i < Tiles; ++i) {
        const Bf16TileRow* row = tile + int64_t{i} * K + k;
        const __m512i wide = _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row->values)));
        const __m512 weights = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m512 value = _mm512_set1_ps(rows[r * x.ld_values + k]);
          acc[i][r] = _mm512_fmadd_ps(value, weights, acc[i][r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        store_row(out.y + r * out.ld_y + i * kTileChannels, out.channels - i * kTileChannels,
                  out.accumulate, acc[i][r]);
      }
    }
  }
};

template <typename Kernel>
void gemm_tiles(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                int tile_begin, int tile_end, bool accumulate) {
  TileLoops<Kernel>{w, x, y, ld_y, accumulate}.gemm(T, tile_begin, tile_end);
}

}  // namespace

void gemm_avx512(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                 int tile_begin, int tile_end, bool accumulate) {
  switch (w.format) {
    case Format::kBf16:
      return gemm_tiles<Bf16Kernel>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kInt8:
      return gemm_tiles<IntKernel<Int8Tile>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kInt4:
      return gemm_tiles<IntKernel<Int4Tile>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
}

}  // namespace fulcrum
