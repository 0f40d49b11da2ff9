// Linear layers for x86-64 with AVX2, FMA and F16C: 8 output channels in the 32-bit lanes of a
// register. Compiled with ISA flags, so everything but the two entry points is local to the file.
//
// The integer formats multiply unsigned 4-bit weights by signed 8-bit activations with vpmaddubsw
// and add in 16 bits over a group: 8 steps * 2 products * 15 * 127 = 30480 cannot overflow. int8
// weights are split into their two nibbles, which costs two multiplications a step, as any other
// exact method without VNNI does, but shares the int4 code and has no saturating case.
#include <immintrin.h>

#include <cstring>

#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"
#include "formats/bf16.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

constexpr int kSteps = kGroupSize / 4;  // of four k, in a group
constexpr float kSmallestMax = 1e-30f;  // as in linear_portable.cpp

// Writes one row of a tile, of which `channels` (16 or fewer) exist.
void store_row(float* y, int channels, bool accumulate, __m256 low, __m256 high) {
  if (channels >= kTileChannels) {
    if (accumulate) {
      low = _mm256_add_ps(_mm256_loadu_ps(y), low);
      high = _mm256_add_ps(_mm256_loadu_ps(y + 8), high);
    }
    _mm256_storeu_ps(y, low);
    _mm256_storeu_ps(y + 8, high);
    return;
  }
  float tail[kTileChannels];
  _mm256_storeu_ps(tail, low);
  _mm256_storeu_ps(tail + 8, high);
  for (int c = 0; c < channels; ++c) y[c] = accumulate ? y[c] + tail[c] : tail[c];
}

__m256 load_half8(const uint16_t* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

__m256i broadcast_four(const int8_t* values) {
  int32_t four;
  std::memcpy(&four, values, 4);
  return _mm256_set1_epi32(four);
}

// dots[r][0] and [1] += low and high nibbles of the group's bytes times the activations of row r,
// as pairs of 16-bit sums; see the layouts in formats/. stride: from a row to the next.
template <int Rows>
inline __attribute__((always_inline)) void dot_nibbles(const uint8_t* quants,
                                                       const int8_t* activations, int64_t stride,
                                                       __m256i (&dots)[Rows][2]) {
  const __m256i mask = _mm256_set1_epi8(15);
  // Loads the activations anew: the compiler would keep those of an int8 tile's first half for
  // the second one, which takes more registers than there are.
  asm volatile("" ::: "memory");
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + s * 32));
    const __m256i low = _mm256_and_si256(bytes, mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m256i four = broadcast_four(activations + r * stride + s * 4);
      const __m256i dot_low = _mm256_maddubs_epi16(low, four);
      const __m256i dot_high = _mm256_maddubs_epi16(high, four);
      dots[r][0] = s == 0 ? dot_low : _mm256_add_epi16(dots[r][0], dot_low);
      dots[r][1] = s == 0 ? dot_high : _mm256_add_epi16(dots[r][1], dot_high);
      // Keeps the additions in this order: reassociated, all products would be alive at once.
      asm("" : "+x"(dots[r][0]), "+x"(dots[r][1]));
    }
  }
}

struct Int4Kernel {
  using Tile = Int4Tile;
  static constexpr int kRows = 4;
  static constexpr bool kPairsTiles = false;
  static int64_t tile_elements(int K) { return num_groups(K); }
  static int64_t row_bytes(int K) { return padded_k(K); }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const Int4Tile* tile, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const int groups = num_groups(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int8_t* activations = x.quantized + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    const float* sums = x.sums + int64_t{t} * groups;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if (kStreams) prefetch<Int4Kernel>(tile[g]);
      __m256i dots[Rows][2];
      dot_nibbles<Rows>(tile[g].quants, activations + g * kGroupSize, stride, dots);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 weight_scales = load_half8(tile[g].scales + h * 8);
        const __m256 weight_minima = load_half8(tile[g].minima + h * 8);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m256 scale = _mm256_broadcast_ss(scales + r * groups + g);
          const __m256 sum = _mm256_mul_ps(scale, _mm256_broadcast_ss(sums + r * groups + g));
          const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r][h], ones));
          const __m256 factor = _mm256_mul_ps(weight_scales, scale);
          acc[r][h] = _mm256_fmadd_ps(factor, dot, acc[r][h]);
          acc[r][h] = _mm256_fmadd_ps(weight_minima, sum, acc[r][h]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      store_row(out.y + r * out.ld_y, out.channels, out.accumulate, acc[r][0], acc[r][1]);
    }
  }
};

struct Int8Kernel {
  using Tile = Int8Tile;
  static constexpr int kRows = 4;
  static constexpr bool kPairsTiles = false;
  static int64_t tile_elements(int K) { return num_groups(K); }
  static int64_t row_bytes(int K) { return padded_k(K); }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const Int8Tile* tile, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const int groups = num_groups(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int8_t* activations = x.quantized + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    const float* sums = x.sums + int64_t{t} * groups;
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i sixteens = _mm256_set1_epi16(16);
    __m256 acc[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if (kStreams) prefetch<Int8Kernel>(tile[g]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m256i dots[Rows][2];
        dot_nibbles<Rows>(tile[g].quants + h * 256, activations + g * kGroupSize, stride, dots);
        const __m256 weight_scales = load_half8(tile[g].scales + h * 8);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m256 scale = _mm256_broadcast_ss(scales + r * groups + g);
          // Both terms are integers below 2^24, so their difference is exact.
          const __m256 offset =
              _mm256_mul_ps(_mm256_set1_ps(128.0f), _mm256_broadcast_ss(sums + r * groups + g));
          const __m256i offset_dot = _mm256_add_epi32(_mm256_madd_epi16(dots[r][0], ones),
                                                      _mm256_madd_epi16(dots[r][1], sixteens));
          const __m256 dot = _mm256_sub_ps(_mm256_cvtepi32_ps(offset_dot), offset);
          const __m256 factor = _mm256_mul_ps(weight_scales, scale);
          acc[r][h] = _mm256_fmadd_ps(factor, dot, acc[r][h]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      store_row(out.y + r * out.ld_y, out.channels, out.accumulate, acc[r][0], acc[r][1]);
    }
  }
};

// One chain of fused multiply-adds per output, in ascending k.
struct Bf16Kernel {
  using Tile = Bf16TileRow;
  static constexpr int kRows = 4;
  static constexpr bool kPairsTiles = true;
  static int64_t tile_elements(int K) { return K; }
  static int64_t row_bytes(int K) { return int64_t{K} * 4; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const Bf16TileRow* tile, int K, const Activations& x, int t,
                  const TileOutput& out) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const float* rows = x.values + t * x.ld_values;
    __m256 acc[Tiles][Rows][2];
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[i][r][0] = acc[i][r][1] = _mm256_setzero_ps();
    }
    for (int k = 0; k < K; ++k) {
      // The hardware follows several tiles at once well, one tile not far enough.
      if (kStreams && Tiles == 1) prefetch<Bf16Kernel>(tile[k]);
#pragma GCC unroll 4
      for (int i = 0; i < Tiles; ++i) {
        const Bf16TileRow* row = tile + int64_t{i} * K + k;
        const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(row->values));
        const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
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
      for (int r = 0; r < Rows; ++r) {
        store_row(out.y + r * out.ld_y + i * kTileChannels, out.channels - i * kTileChannels,
                  out.accumulate, acc[i][r][0], acc[i][r][1]);
      }
    }
  }
};

template <typename Kernel>
void gemm_tiles(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                int tile_begin, int tile_end, bool accumulate) {
  TileLoops<Kernel>{w, x, y, ld_y, accumulate}.gemm(T, tile_begin, tile_end);
}

float horizontal_max(__m256 values) {
  __m128 max = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  max = _mm_max_ps(max, _mm_movehl_ps(max, max));
  max = _mm_max_ss(max, _mm_movehdup_ps(max));
  return _mm_cvtss_f32(max);
}

int horizontal_sum(__m256i values) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return _mm_cvtsi128_si32(sum);
}

void quantize_group(const float* values, int8_t* quantized, float* scale, float* sum) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 x[4];
  __m256 max_lanes = _mm256_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_loadu_ps(values + i * 8);
    max_lanes = _mm256_max_ps(max_lanes, _mm256_and_ps(x[i], magnitude));
  }
  // max of two returns the second where one is NaN: a group of NaNs gets a scale of NaN.
  const float max = horizontal_max(max_lanes);
  const bool is_zero = max < kSmallestMax;
  const __m256 inverse = _mm256_set1_ps(is_zero ? 0.0f : 127.0f / max);
  __m256i quants[4];
  for (int i = 0; i < 4; ++i) quants[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(quants[0], quants[1]),
                                         _mm256_add_epi32(quants[2], quants[3]));
  // The packs work within 128-bit halves; the permutation puts the 32-bit pieces in order.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(quants[0], quants[1]),
                                           _mm256_packs_epi32(quants[2], quants[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(quantized),
                      _mm256_permutevar8x32_epi32(bytes, order));
  *scale = is_zero ? 0.0f : max / 127.0f;
  *sum = static_cast<float>(horizontal_sum(total));
}

}  // namespace

void quantize_rows_avx2(const Activations& x, int K, int row_begin, int row_end) {
  const int groups = num_groups(K);
  for (int t = row_begin; t < row_end; ++t) {
    for (int g = 0; g < groups; ++g) {
      const int64_t index = int64_t{t} * groups + g;
      const float* values = x.values + t * x.ld_values + g * kGroupSize;
      float padded[kGroupSize] = {};
      if (K - g * kGroupSize < kGroupSize) {
        std::memcpy(padded, values, (K - g * kGroupSize) * sizeof(float));
        values = padded;
      }
      quantize_group(values, x.quantized + index * kGroupSize, x.scales + index, x.sums + index);
    }
  }
}

void gemm_avx2(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
               int tile_begin, int tile_end, bool accumulate) {
  switch (w.format) {
    case Format::kBf16:
      return gemm_tiles<Bf16Kernel>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kInt8:
      return gemm_tiles<Int8Kernel>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kInt4:
      return gemm_tiles<Int4Kernel>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
}

}  // namespace fulcrum
