// What the AVX-512 kernels of linear layers share. Included only by files compiled with AVX-512.
#pragma once

#include "cpu/intrinsics.h"
#include "cpu/linear_tiles.h"

namespace fulcrum {
namespace {

// Writes one row of a tile, of which `channels` (16 or fewer) exist.
inline void store_row(float* y, int channels, bool accumulate, __m512 values) {
  if (channels >= kTileChannels) {
    _mm512_storeu_ps(y, accumulate ? _mm512_add_ps(_mm512_loadu_ps(y), values) : values);
    return;
  }
  float tail[kTileChannels];
  _mm512_storeu_ps(tail, values);
  for (int c = 0; c < channels; ++c) y[c] = accumulate ? y[c] + tail[c] : tail[c];
}

}  // namespace
}  // namespace fulcrum
