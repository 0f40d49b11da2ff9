// Linear layers for x86-64 with AVX2, FMA and F16C: 8 output channels in the 32-bit lanes of a
// register. Compiled with ISA flags, so everything but the two entry points is local to the file.
//
// int4 multiplies unsigned 4-bit weights by signed 8-bit activations with vpmaddubsw and adds in 16
// bits over a group: 8 steps * 2 products * 15 * 127 = 30480 cannot overflow. int8 multiplies in 16
// bits with vpmaddwd and adds in 32. Without VNNI any exact product of bytes takes two
// multiplications for what vpmaddubsw does in one, and these need no other step: Zen 4 multiplies,
// integers and floats alike, in two of its four pipes, and they bound all kernels of few rows.
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

// Four bytes or two 16-bit words.
__m256i broadcast_32(const void* values) {
  int32_t bits;
  std::memcpy(&bits, values, 4);
  return _mm256_set1_epi32(bits);
}

// dots[r][0] and [1] += low and high nibbles of the group's bytes times the activations of row r,
// as pairs of 16-bit sums; see the layouts in formats/. stride: from a row to the next.
template <int Rows>
inline __attribute__((always_inline)) void dot_nibbles(const uint8_t* quants,
                                                       const int8_t* activations, int64_t stride,
                                                       __m256i (&dots)[Rows][2]) {
  const __m256i mask = _mm256_set1_epi8(15);
  // Keeps the loads where they are used: moved ahead, they take more registers than there are.
  asm volatile("" ::: "memory");
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + s * 32));
    const __m256i low = _mm256_and_si256(bytes, mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m256i four = broadcast_32(activations + r * stride + s * 4);
      const __m256i dot_low = _mm256_maddubs_epi16(low, four);
      const __m256i dot_high = _mm256_maddubs_epi16(high, four);
      dots[r][0] = s == 0 ? dot_low : _mm256_add_epi16(dots[r][0], dot_low);
      dots[r][1] = s == 0 ? dot_high : _mm256_add_epi16(dots[r][1], dot_high);
      // Keeps the additions in this order: reassociated, all products would be alive at once.
      asm("" : "+x"(dots[r][0]), "+x"(dots[r][1]));
    }
  }
}

// dots[r][0] and [1] = the 32-bit sums of channels 0…7 and 8…15.
template <int Rows>
inline __attribute__((always_inline)) void dot_bytes(const uint8_t* quants,
                                                     const int16_t* activations, int64_t stride,
                                                     __m256i (&dots)[Rows][2]) {
  asm volatile("" ::: "memory");  // as in dot_nibbles
#pragma GCC unroll 16
  for (int s = 0; s < kGroupSize / 2; ++s) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(quants + s * 32);
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1));
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m256i two = broadcast_32(activations + r * stride + s * 2);
      const __m256i dot_low = _mm256_madd_epi16(low, two);
      const __m256i dot_high = _mm256_madd_epi16(high, two);
      dots[r][0] = s == 0 ? dot_low : _mm256_add_epi32(dots[r][0], dot_low);
      dots[r][1] = s == 0 ? dot_high : _mm256_add_epi32(dots[r][1], dot_high);
      asm("" : "+x"(dots[r][0]), "+x"(dots[r][1]));  // as in dot_nibbles
    }
  }
}

struct Int4Kernel {
  using Tile = Int4Tile;
  static constexpr int kRows = 6;
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
      if (!kStreams) prefetch(tile[groups + g]);
      __m256i dots[Rows][2];
      dot_nibbles<Rows>(tile[g].quants, activations + g * kGroupSize, stride, dots);
      const __m256 weight_scales[2] = {load_half8(tile[g].scales), load_half8(tile[g].scales + 8)};
      const __m256 weight_minima[2] = {load_half8(tile[g].minima), load_half8(tile[g].minima + 8)};
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m256 scale = _mm256_broadcast_ss(scales + r * groups + g);
        const __m256 sum = _mm256_mul_ps(scale, _mm256_broadcast_ss(sums + r * groups + g));
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r][h], ones));
          const __m256 factor = _mm256_mul_ps(weight_scales[h], scale);
          acc[r][h] = _mm256_fmadd_ps(factor, dot, acc[r][h]);
          acc[r][h] = _mm256_fmadd_ps(weight_minima[h], sum, acc[r][h]);
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
  static constexpr int kRows = 6;
  static constexpr bool kPairsTiles = false;
  static int64_t tile_elements(int K) { return num_groups(K); }
  static int64_t row_bytes(int K) { return int64_t{padded_k(K)} * 2; }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const Int8Tile* tile, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const int groups = num_groups(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int16_t* activations = x.widened + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    __m256 acc[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if (!kStreams) prefetch(tile[groups + g]);
      __m256i dots[Rows][2];
      dot_bytes<Rows>(tile[g].quants, activations + g * kGroupSize, stride, dots);
      const __m256 weight_scales[2] = {load_half8(tile[g].scales), load_half8(tile[g].scales + 8)};
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m256 scale = _mm256_broadcast_ss(scales + r * groups + g);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256 factor = _mm256_mul_ps(weight_scales[h], scale);
          acc[r][h] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots[r][h]), acc[r][h]);
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
      // The hardware follows several tiles at once well, one tile of these not far enough.
      if (!kStreams || Tiles == 1) prefetch(tile[kStreams ? k + 96 : k + K]);
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

}  // namespace

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
