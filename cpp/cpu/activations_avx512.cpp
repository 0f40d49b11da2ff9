// The int8 form of activations for x86-64 with AVX-512: four groups at a time, so that what is one
// value a group (maximum, scale, sum) is computed for four at once. Compiled with ISA flags, so
// everything but the entry point is local to the file.
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/linear_isa.h"

namespace fulcrum {
namespace {

constexpr int kBatch = 4;               // groups
constexpr int kHalf = kGroupSize / 2;   // values of a register
constexpr float kSmallestMax = 1e-30f;  // as in linear_portable.cpp

// Lane g of the result: op over all lanes of of_groups[g].
template <typename Op>
__m128 reduce(const __m512 (&of_groups)[kBatch], Op op) {
  __m512d pairs[2];  // each 128 bits: two partial results of two groups
  for (int i = 0; i < 2; ++i) {
    const __m512 first = of_groups[2 * i], second = of_groups[2 * i + 1];
    pairs[i] =
        _mm512_castps_pd(op(_mm512_unpacklo_ps(first, second), _mm512_unpackhi_ps(first, second)));
  }
  __m512 lanes = op(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  lanes = op(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
  lanes = op(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
  return _mm512_castps512_ps128(lanes);
}

inline void store_lanes(float* out, __m128 lanes, int count) {
  if (count == kBatch) {
    _mm_storeu_ps(out, lanes);
    return;
  }
  float all[kBatch];
  _mm_storeu_ps(all, lanes);
  std::memcpy(out, all, count * sizeof(float));
}

// Where four groups come from, and where their int8 form goes, side by side.
struct FourGroups {
  const float* values[kBatch];
  int8_t* quantized;
  float* scales;
  float* sums;
  float* totals;
};

// Only the first `count` groups are written.
inline __attribute__((always_inline)) void quantize_batch(const FourGroups& batch, int count) {
  __m512 magnitudes[kBatch];
  for (int g = 0; g < kBatch; ++g) {
    magnitudes[g] = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(batch.values[g])),
                                  _mm512_abs_ps(_mm512_loadu_ps(batch.values[g] + kHalf)));
  }
  // max of two returns the second where one is NaN: a group of NaNs gets a scale of NaN.
  const __m128 max = reduce(magnitudes, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  const __m128 is_nonzero = _mm_cmpnlt_ps(max, _mm_set1_ps(kSmallestMax));
  float inverse[kBatch];
  _mm_storeu_ps(inverse, _mm_and_ps(is_nonzero, _mm_div_ps(_mm_set1_ps(127.0f), max)));
  __m512 half_sums[kBatch];  // integers, as bits
  for (int g = 0; g < kBatch; ++g) {
    const __m512 factor = _mm512_set1_ps(inverse[g]);
    __m512i quants[2];
    for (int half = 0; half < 2; ++half) {
      const __m512 values = _mm512_loadu_ps(batch.values[g] + half * kHalf);
      quants[half] = _mm512_cvtps_epi32(_mm512_mul_ps(values, factor));
      if (g < count) {
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(batch.quantized + g * kGroupSize + half * kHalf),
            _mm512_cvtsepi32_epi8(quants[half]));
      }
    }
    half_sums[g] = _mm512_castsi512_ps(_mm512_add_epi32(quants[0], quants[1]));
  }
  const __m128 integers = reduce(half_sums, [](__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  });
  const __m128 sums = _mm_cvtepi32_ps(_mm_castps_si128(integers));
  const __m128 scales = _mm_and_ps(is_nonzero, _mm_div_ps(max, _mm_set1_ps(127.0f)));
  store_lanes(batch.scales, scales, count);
  store_lanes(batch.sums, sums, count);
  store_lanes(batch.totals, _mm_mul_ps(scales, sums), count);
}

}  // namespace

void quantize_rows_avx512(const Activations& x, int K, int row_begin, int row_end) {
  const int groups = num_groups(K);
  for (int t = row_begin; t < row_end; ++t) {
    const float* row = x.values + t * x.ld_values;
    float padded[kGroupSize] = {};  // the last group, where K cuts it short, and those after it
    for (int g = 0; g < groups; g += kBatch) {
      const int64_t index = int64_t{t} * groups + g;
      FourGroups batch = {
          {}, x.quantized + index * kGroupSize, x.scales + index, x.sums + index, x.totals + index};
      if ((g + kBatch) * kGroupSize <= K) {
        for (int i = 0; i < kBatch; ++i) batch.values[i] = row + (g + i) * kGroupSize;
        quantize_batch(batch, kBatch);
        continue;
      }
      for (int i = 0; i < kBatch; ++i) {
        const int first = (g + i) * kGroupSize;
        batch.values[i] = first + kGroupSize <= K ? row + first : padded;
        if (first < K && K < first + kGroupSize) {
          std::memcpy(padded, row + first, (K - first) * sizeof(float));
        }
      }
      quantize_batch(batch, groups - g < kBatch ? groups - g : kBatch);
    }
  }
}

}  // namespace fulcrum
