// How the float formats become pairs of bf16 values, what vdpbf16ps and AMX multiply: 16 channels,
// two k each. Included only by files compiled with AVX512-BF16.
#pragma once

#include "cpu/tile_avx512.h"
#include "formats/bf16.h"
#include "formats/fp8.h"

namespace fulcrum {
namespace {

// The first `count` of 16 values, zeros after them.
inline __m512 load_first(const float* from, int count) {
  if (count >= 16) return _mm512_loadu_ps(from);
  float values[16] = {};
  for (int i = 0; i < count; ++i) values[i] = from[i];
  return _mm512_loadu_ps(values);
}

// The first `count` of 32 values rounded to bf16, in order, zeros after them. The casts keep the
// bits: what the type of 32 bf16 values is made of depends on the compiler.
inline __m512i round_first(const float* from, int count) {
  const __m512 low = load_first(from, count), high = load_first(from + 16, count - 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

struct Bf16Decoder {
  using Row = Bf16TileRow;
  static constexpr bool kIsBf16 = true;
  static constexpr int64_t kHeaderBytes = 0;

  static __m512i load_pair(const Row* rows) { return _mm512_loadu_si512(rows); }
  static __m512 scale(const uint8_t*, __m512 values) { return values; }
};

struct Fp8Decoder {
  using Row = Fp8TileRow;
  static constexpr bool kIsBf16 = false;
  static constexpr int64_t kHeaderBytes = sizeof(Fp8Tile);

  // 1 / kFp8ToHalf of the values, as the scales want it. Shifted into place, exponent and mantissa
  // are those of a bf16 that is 2^-120 times as large, which an addition to the exponent undoes.
  // vdpbf16ps has no subnormal values: those of e4m3, which are normal in bf16, come from a table.
  static __m512i load_pair(const Row* rows) {
    const __m512i bytes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
    const __m512i shifted = _mm512_slli_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0x7f)), 4);
    // 0…7 times 2^-17; the low bits of a subnormal byte are its place.
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860));
    const auto is_normal = _mm512_test_epi16_mask(bytes, _mm512_set1_epi16(0x78));
    const __m512i magnitude = _mm512_mask_add_epi16(
        _mm512_permutexvar_epi16(bytes, table), is_normal, shifted, _mm512_set1_epi16(112 << 7));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(magnitude, sign);
  }
  static __m512 scale(const uint8_t* tile, __m512 values) {
    return _mm512_mul_ps(values, _mm512_loadu_ps(tile));
  }
};

// Bytes of a tile of K weights.
template <typename Decoder>
int64_t pair_tile_bytes(int K) {
  return Decoder::kHeaderBytes +
         num_tile_rows(Lanes512Pairs{}, K) * static_cast<int64_t>(sizeof(typename Decoder::Row));
}

}  // namespace
}  // namespace fulcrum
