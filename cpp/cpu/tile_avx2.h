// What the AVX2 kernels of linear layers share. Included only by files compiled with AVX2, FMA and
// F16C.
#pragma once

#include <immintrin.h>

#include "cpu/linear_tiles.h"

namespace fulcrum {
namespace {

// Writes one row of a tile, of which `channels` (16 or fewer) exist.
inline void store_row(float* y, int channels, bool accumulate, __m256 low, __m256 high) {
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

inline __m256 load_half8(const uint16_t* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

// The rows of one tile, channels 0…7 and 8…15 of each.
template <int Rows>
inline __attribute__((always_inline)) void store_rows(const TileOutput& out,
                                                      const __m256 (&values)[Rows][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    store_row(out.y + r * out.ld_y, out.channels, out.accumulate, values[r][0], values[r][1]);
  }
}

}  // namespace
}  // namespace fulcrum
