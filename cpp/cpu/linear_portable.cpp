// Linear layers in plain C++: the oracle that every other instruction set is compared with, and
// what runs where none of them is there. Loops are written so that compilers vectorise them.
#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/linear_isa.h"
#include "formats/bf16.h"
#include "formats/int4.h"
#include "formats/int8.h"

namespace fulcrum {
namespace {

constexpr int kRowBlock = 8;            // rows that share the decoding of a weight group
constexpr float kSmallestMax = 1e-30f;  // 127 / max stays finite; smaller groups count as zero

// Rounds to nearest even for |x| < 2^22: the addition leaves the integer in the low bits.
int round_to_int(float x) {
  return std::bit_cast<int32_t>(x + 12582912.0f) - std::bit_cast<int32_t>(12582912.0f);
}

void quantize_group(const float* values, int8_t* quantized, float* scale, float* sum) {
  float max = 0.0f;
  // std::max returns the first where one is NaN: a group of NaNs gets a scale of NaN.
  for (int i = 0; i < kGroupSize; ++i) max = std::max(std::fabs(values[i]), max);
  const bool is_zero = max < kSmallestMax;
  const float inverse = is_zero ? 0.0f : 127.0f / max;
  int total = 0;
  for (int i = 0; i < kGroupSize; ++i) {
    quantized[i] = static_cast<int8_t>(round_to_int(values[i] * inverse));
    total += quantized[i];
  }
  *scale = is_zero ? 0.0f : max / 127.0f;
  *sum = static_cast<float>(total);
}

int dot_group(const int8_t* weights, const int8_t* activations) {
  int sum = 0;
  for (int i = 0; i < kGroupSize; ++i) sum += weights[i] * activations[i];
  return sum;
}

struct DecodedGroup {
  int8_t quants[kGroupSize];
  float scale;
  float minimum;
};

void decode(const Int4Group& group, DecodedGroup* out) {
  for (int i = 0; i < kGroupSize / 2; ++i) {
    out->quants[i] = static_cast<int8_t>(group.quants[i] & 15);
    out->quants[i + kGroupSize / 2] = static_cast<int8_t>(group.quants[i] >> 4);
  }
  out->scale = half_to_float(group.scale);
  out->minimum = half_to_float(group.minimum);
}

void decode(const Int8Group& group, DecodedGroup* out) {
  std::copy_n(group.quants, kGroupSize, out->quants);
  out->scale = half_to_float(group.scale);
  out->minimum = 0.0f;
}

template <typename Group>
void gemm_groups(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                 int channel_begin, int channel_end, bool accumulate) {
  const int groups = num_groups(w.K);
  for (int t0 = 0; t0 < T; t0 += kRowBlock) {
    const int rows = std::min(kRowBlock, T - t0);
    for (int n = channel_begin; n < channel_end; ++n) {
      const Group* row = reinterpret_cast<const Group*>(w.data) + int64_t{n} * groups;
      float sums[kRowBlock] = {};
      for (int g = 0; g < groups; ++g) {
        DecodedGroup group;
        decode(row[g], &group);
        for (int r = 0; r < rows; ++r) {
          const int64_t index = int64_t{t0 + r} * groups + g;
          const int dot = dot_group(group.quants, x.quantized + index * kGroupSize);
          sums[r] += group.scale * x.scales[index] * static_cast<float>(dot);
          sums[r] += group.minimum * (x.scales[index] * x.sums[index]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        float* out = y + (t0 + r) * ld_y + n;
        *out = accumulate ? *out + sums[r] : sums[r];
      }
    }
  }
}

void gemm_bf16(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
               int channel_begin, int channel_end, bool accumulate) {
  for (int n0 = channel_begin; n0 < channel_end; n0 += kTileChannels) {
    const Bf16TileRow* tile =
        reinterpret_cast<const Bf16TileRow*>(w.data) + int64_t{n0 / kTileChannels} * w.K;
    const int channels = std::min(kTileChannels, channel_end - n0);
    for (int t = 0; t < T; ++t) {
      const float* row = x.values + t * x.ld_values;
      float sums[kTileChannels] = {};
      for (int k = 0; k < w.K; ++k) {
        for (int c = 0; c < kTileChannels; ++c) {
          sums[c] += bf16_to_float(tile[k].values[c]) * row[k];
        }
      }
      float* out = y + t * ld_y + n0;
      for (int c = 0; c < channels; ++c) out[c] = accumulate ? out[c] + sums[c] : sums[c];
    }
  }
}

}  // namespace

void quantize_rows_portable(const Activations& x, int K, int row_begin, int row_end) {
  const int groups = num_groups(K);
  for (int t = row_begin; t < row_end; ++t) {
    const float* row = x.values + t * x.ld_values;
    for (int g = 0; g < groups; ++g) {
      const int64_t index = int64_t{t} * groups + g;
      const float* values = row + g * kGroupSize;
      float padded[kGroupSize] = {};
      if (K - g * kGroupSize < kGroupSize) {
        std::copy_n(values, K - g * kGroupSize, padded);
        values = padded;
      }
      quantize_group(values, x.quantized + index * kGroupSize, x.scales + index, x.sums + index);
    }
  }
}

void gemm_portable(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                   int tile_begin, int tile_end, bool accumulate) {
  const int begin = tile_begin * kTileChannels;
  const int end = std::min(tile_end * kTileChannels, w.N);
  switch (w.format) {
    case Format::kBf16:
      return gemm_bf16(w, x, T, y, ld_y, begin, end, accumulate);
    case Format::kInt8:
      return gemm_groups<Int8Group>(w, x, T, y, ld_y, begin, end, accumulate);
    case Format::kInt4:
      return gemm_groups<Int4Group>(w, x, T, y, ld_y, begin, end, accumulate);
  }
}

}  // namespace fulcrum
