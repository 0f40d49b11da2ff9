// Linear layers for x86-64 with AVX2, FMA and F16C: 8 output channels in the 32-bit lanes of a
// register. Here are the integer formats; the others are in linear_avx2_float.cpp. Compiled with
// ISA flags, so everything but the entry point is local to the file.
//
// int4 multiplies unsigned 4-bit weights by signed 8-bit activations with vpmaddubsw and adds in 16
// bits over a group: 8 steps * 2 products * 15 * 127 = 30480 cannot overflow. int8 multiplies in 16
// bits with vpmaddwd and adds in 32. Without VNNI any exact product of bytes takes two
// multiplications for what vpmaddubsw does in one, and these need no other step: Zen 4 multiplies,
// integers and floats alike, in two of its four pipes, and they bound all kernels of few rows.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"
#include "cpu/tile_avx2.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

constexpr int kSteps = kGroupSize / 4;  // of four k, in a group

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

template <int kGroups, bool kHasMinimum>
struct Int4Kernel {
  using Tile = Int4Tile<kGroups, kHasMinimum>;
  static constexpr int kFewRows = 6, kBlockRows = 6, kBlockTiles = 1;
  static constexpr int few_tiles(int) { return 1; }
  static int64_t tile_bytes(int K) { return int4_bytes<Tile, kGroups>(K); }
  static int64_t row_bytes(int K) { return padded_k(K); }

  static void add_scaled(const Tile& tile, int half, __m256 products, __m256 totals, __m256* acc) {
    *acc = _mm256_fmadd_ps(load_half8(tile.scales[0] + half * 8), products, *acc);
    if (kHasMinimum) {
      const uint16_t* minima = tile.scales[kHasMinimum];
      *acc = _mm256_fmadd_ps(load_half8(minima + half * 8), totals, *acc);
    }
  }

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
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int i = 0; i < scale_groups; ++i, ++tile) {
      if (!kStreams) prefetch<sizeof(Tile)>(reinterpret_cast<const char*>(tile) + next);
      // Of the groups that share a scale: products with the activations, and their sums.
      __m256 products[Rows][2], totals[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        products[r][0] = products[r][1] = totals[r] = _mm256_setzero_ps();
      }
      const int begin = i * kGroups;
      const int end = kGroups == 1 || begin + kGroups < groups ? begin + kGroups : groups;
      for (int g = begin; g < end; ++g) {
        __m256i dots[Rows][2];
        dot_nibbles<Rows>(tile->quants[g - begin], activations + g * kGroupSize, stride, dots);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m256 scale = _mm256_broadcast_ss(scales + r * groups + g);
          const __m256 sum = _mm256_broadcast_ss(sums + r * groups + g);
          const __m256 shift = _mm256_mul_ps(_mm256_set1_ps(kInt4ZeroPoint), sum);
          if (kHasMinimum) totals[r] = _mm256_fmadd_ps(scale, sum, totals[r]);
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r][h], ones));
            // Both are integers below 2^24, so their difference is exact.
            if (!kHasMinimum) dot = _mm256_sub_ps(dot, shift);
            products[r][h] = _mm256_fmadd_ps(scale, dot, products[r][h]);
            if (kGroups == 1) add_scaled(*tile, h, products[r][h], totals[r], &acc[r][h]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows && kGroups > 1; ++r) {
        add_scaled(*tile, 0, products[r][0], totals[r], &acc[r][0]);
        add_scaled(*tile, 1, products[r][1], totals[r], &acc[r][1]);
      }
    }
    store_rows<Rows>(out, acc);
  }
};

// Quants: Int8Tile, where each group has its scales, or Int8Quants, where the tile has some.
template <typename Quants>
struct Int8Kernel {
  static constexpr bool kPerChannel = std::is_same_v<Quants, Int8Quants>;
  static constexpr int kFewRows = 6, kBlockRows = 6, kBlockTiles = 1;
  static constexpr int few_tiles(int) { return 1; }
  static int64_t tile_bytes(int K) {
    return (kPerChannel ? sizeof(Int8ChannelTile) : 0) + num_groups(K) * int64_t{sizeof(Quants)};
  }
  static int64_t row_bytes(int K) { return int64_t{padded_k(K)} * 2; }

  static __m256 group_scales(const Int8Tile& tile, int half) {
    return load_half8(tile.scales + half * 8);
  }
  static __m256 group_scales(const Int8Quants&, int) { return _mm256_set1_ps(1.0f); }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& x, int t, const TileOutput& out) {
    static_assert(Tiles == 1);
    const int groups = num_groups(K);
    const int64_t stride = int64_t{groups} * kGroupSize;
    const int16_t* activations = x.widened + t * stride;
    const float* scales = x.scales + int64_t{t} * groups;
    const float* channel_scales = reinterpret_cast<const float*>(data);
    const Quants* tile =
        reinterpret_cast<const Quants*>(data + (kPerChannel ? sizeof(Int8ChannelTile) : 0));
    __m256 acc[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if (!kStreams) prefetch<sizeof(Quants)>(tile + groups + g);
      __m256i dots[Rows][2];
      dot_bytes<Rows>(tile[g].quants, activations + g * kGroupSize, stride, dots);
      const __m256 weight_scales[2] = {group_scales(tile[g], 0), group_scales(tile[g], 1)};
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m256 scale = _mm256_broadcast_ss(scales + r * groups + g);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256 factor = kPerChannel ? scale : _mm256_mul_ps(weight_scales[h], scale);
          acc[r][h] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots[r][h]), acc[r][h]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows && kPerChannel; ++r) {
      acc[r][0] = _mm256_mul_ps(acc[r][0], _mm256_loadu_ps(channel_scales));
      acc[r][1] = _mm256_mul_ps(acc[r][1], _mm256_loadu_ps(channel_scales + 8));
    }
    store_rows<Rows>(out, acc);
  }
};

}  // namespace

void gemm_avx2(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
               int tile_begin, int tile_end, bool accumulate) {
  switch (w.format) {
    case Format::kBf16:
    case Format::kFp8:
      return gemm_float_avx2(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
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
