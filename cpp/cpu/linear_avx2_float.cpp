// Linear layers of the float formats for x86-64 with AVX2, FMA and F16C: 8 output channels in the
// lanes of a register. Compiled with ISA flags, so everything but the entry point is local to the
// file.
#include <immintrin.h>

#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"
#include "cpu/tile_avx2.h"
#include "formats/bf16.h"
#include "formats/fp8.h"

namespace fulcrum {
namespace {

struct Bf16Decoder {
  using Row = Bf16TileRow;
  static constexpr int64_t kHeaderBytes = 0;

  static void load(const Row& row, __m256* low, __m256* high) {
    const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(row.values));
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *high = _mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void scale(const uint8_t*, __m256 (&)[2]) {}
};

struct Fp8Decoder {
  using Row = Fp8TileRow;
  static constexpr int64_t kHeaderBytes = sizeof(Fp8Tile);

  // The byte becomes the upper half of 16 bits; the shift moves all but the sign into place.
  static __m256 decode(__m128i words) {
    const __m128i mask = _mm_set1_epi16(static_cast<int16_t>(0xbfff));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(words, 1), mask));
  }
  static void load(const Row& row, __m256* low, __m256* high) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values));
    *low = decode(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
    *high = decode(_mm_unpackhi_epi8(_mm_setzero_si128(), bytes));
  }
  static void scale(const uint8_t* tile, __m256 (&values)[2]) {
    const float* scales = reinterpret_cast<const float*>(tile);
    for (int h = 0; h < 2; ++h) {
      values[h] = _mm256_mul_ps(values[h], _mm256_loadu_ps(scales + h * 8));
    }
  }
};

// One chain of fused multiply-adds per output, in ascending k.
template <typename Decoder>
struct FloatKernel {
  using Row = typename Decoder::Row;
  static constexpr int kFewRows = 4, kBlockRows = 4, kBlockTiles = 1;
  static constexpr int few_tiles(int rows) { return rows < 3 ? 4 / rows : 1; }
  static int64_t tile_bytes(int K) {
    return Decoder::kHeaderBytes + int64_t{K} * static_cast<int64_t>(sizeof(Row));
  }
  static int64_t row_bytes(int K) { return int64_t{K} * 4; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& x, int t, const TileOutput& out) {
    const float* rows = x.values + t * x.ld_values;
    __m256 acc[Tiles][Rows][2];
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[i][r][0] = acc[i][r][1] = _mm256_setzero_ps();
    }
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < Tiles; ++i) {
        const Row* row =
            reinterpret_cast<const Row*>(data + i * tile_bytes(K) + Decoder::kHeaderBytes) + k;
        // The hardware follows several tiles at once well, one tile of these not far enough.
        if (!kStreams) {
          prefetch<sizeof(Row)>(row + K);
        } else if (Tiles == 1) {
          prefetch<sizeof(Row)>(row + kStreamDistanceBytes / sizeof(Row));
        }
        __m256 low, high;
        Decoder::load(*row, &low, &high);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m256 value = _mm256_broadcast_ss(rows + r * x.ld_values + k);
          acc[i][r][0] = _mm256_fmadd_ps(value, low, acc[i][r][0]);
          acc[i][r][1] = _mm256_fmadd_ps(value, high, acc[i][r][1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) Decoder::scale(data + i * tile_bytes(K), acc[i][r]);
      store_rows<Rows>(
          {out.y + i * kTileChannels, out.ld_y, out.channels - i * kTileChannels, out.accumulate},
          acc[i]);
    }
  }
};

}  // namespace

void gemm_float_avx2(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                     int tile_begin, int tile_end, bool accumulate) {
  if (w.format == Format::kFp8) {
    return gemm_tiles<FloatKernel<Fp8Decoder>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
  gemm_tiles<FloatKernel<Bf16Decoder>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
}

}  // namespace fulcrum
