// Linear layers of the float formats for x86-64 with AVX-512: 16 output channels, a tile, in the
// lanes of a register. Compiled with ISA flags, so everything but the entry point is local to the
// file. Weights are widened and multiplied in float; with AVX512-BF16, linear_avx512_bf16.cpp is
// used instead.
#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"
#include "cpu/tile_avx512.h"
#include "formats/bf16.h"
#include "formats/fp8.h"

namespace fulcrum {
namespace {

struct Bf16Decoder {
  using Row = Bf16TileRow;
  static constexpr int64_t kHeaderBytes = 0;

  static __m512 load(const Row& row) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.values)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static __m512 scale(const uint8_t*, __m512 values) { return values; }
};

struct Fp8Decoder {
  using Row = Fp8TileRow;
  static constexpr int64_t kHeaderBytes = sizeof(Fp8Tile);

  // The byte becomes the upper half of 16 bits; the shift moves all but the sign into place.
  static __m512 load(const Row& row) {
    const __m256i wide =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values)));
    const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(0xbfff));
    const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1);
    return _mm512_cvtph_ps(_mm256_and_si256(shifted, mask));
  }
  static __m512 scale(const uint8_t* tile, __m512 values) {
    return _mm512_mul_ps(values, _mm512_loadu_ps(tile));
  }
};

// One chain of fused multiply-adds per output, in ascending k.
template <typename Decoder>
struct FloatKernel {
  using Row = typename Decoder::Row;
  static constexpr int kFewRows = 8, kBlockRows = 8, kBlockTiles = 2;
  static constexpr int few_tiles(int rows) { return rows < 3 ? 4 / rows : 1; }
  static int64_t tile_bytes(int K) {
    return Decoder::kHeaderBytes + int64_t{K} * static_cast<int64_t>(sizeof(Row));
  }
  static int64_t row_bytes(int K) { return int64_t{K} * 4; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& x, int t, const TileOutput& out) {
    const float* rows = x.values + t * x.ld_values;
    __m512 acc[Tiles][Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[i][r] = _mm512_setzero_ps();
    }
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < Tiles; ++i) {
        const Row* row =
            reinterpret_cast<const Row*>(data + i * tile_bytes(K) + Decoder::kHeaderBytes) + k;
        // The hardware follows several tiles at once well, one tile of these not far enough.
        if (!kStreams) {
          prefetch<sizeof(Row)>(reinterpret_cast<const char*>(row) + Tiles * tile_bytes(K));
        } else if (Tiles == 1) {
          prefetch<sizeof(Row)>(row + kStreamDistanceBytes / sizeof(Row));
        }
        const __m512 weights = Decoder::load(*row);
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
                  out.accumulate, Decoder::scale(data + i * tile_bytes(K), acc[i][r]));
      }
    }
  }
};

}  // namespace

void gemm_float_avx512(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                       int tile_begin, int tile_end, bool accumulate) {
  if (w.format == Format::kFp8) {
    return gemm_tiles<FloatKernel<Fp8Decoder>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
  gemm_tiles<FloatKernel<Bf16Decoder>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
}

}  // namespace fulcrum
