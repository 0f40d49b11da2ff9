// The int8 form of activations for x86-64 with AVX2. Compiled with ISA flags, so everything but the
// entry point is local to the file.
#include <immintrin.h>

#include <cstring>

#include "cpu/linear_isa.h"

namespace fulcrum {
namespace {

constexpr float kSmallestMax = 1e-30f;  // as in linear_portable.cpp

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

// widened may be nullptr.
void quantize_group(const float* values, int8_t* quantized, int16_t* widened, float* scale,
                    float* sum) {
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
  const __m256i words[2] = {_mm256_packs_epi32(quants[0], quants[1]),
                            _mm256_packs_epi32(quants[2], quants[3])};
  const __m256i bytes = _mm256_packs_epi16(words[0], words[1]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(quantized),
                      _mm256_permutevar8x32_epi32(bytes, order));
  for (int i = 0; i < 2 && widened != nullptr; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(widened + i * 16),
                        _mm256_permute4x64_epi64(words[i], 0xd8));
  }
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
      int16_t* widened = x.widened == nullptr ? nullptr : x.widened + index * kGroupSize;
      quantize_group(values, x.quantized + index * kGroupSize, widened, x.scales + index,
                     x.sums + index);
      x.totals[index] = x.scales[index] * x.sums[index];
    }
  }
}

}  // namespace fulcrum
