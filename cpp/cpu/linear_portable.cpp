// Linear layers in plain C++: the oracle that every other instruction set is compared with, and
// what runs where none of them is there. Loops are written so that compilers vectorise them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cpu/linear_isa.h"
#include "formats/bf16.h"
#include "formats/fp8.h"
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

// 32 weights, as w = scale * (q + offset) + minimum with the scale and minimum of their group.
void decode(const uint8_t* nibbles, int offset, int8_t* quants) {
  for (int i = 0; i < kGroupSize / 2; ++i) {
    quants[i] = static_cast<int8_t>((nibbles[i] & 15) + offset);
    quants[i + kGroupSize / 2] = static_cast<int8_t>((nibbles[i] >> 4) + offset);
  }
}

// Calls op(first row, rows, channel, y) for every channel and block of rows, op adding to the
// block's sums, which then go to y.
template <typename Op>
void for_channels(int T, float* y, int64_t ld_y, int channel_begin, int channel_end,
                  bool accumulate, Op op) {
  for (int t0 = 0; t0 < T; t0 += kRowBlock) {
    const int rows = std::min(kRowBlock, T - t0);
    for (int n = channel_begin; n < channel_end; ++n) {
      float sums[kRowBlock] = {};
      op(t0, rows, n, sums);
      for (int r = 0; r < rows; ++r) {
        float* out = y + (t0 + r) * ld_y + n;
        *out = accumulate ? *out + sums[r] : sums[r];
      }
    }
  }
}

template <int kGroups, bool kHasMinimum>
void add_int4_row(const Int4Group<kGroups, kHasMinimum>* row, int groups, const Activations& x,
                  int t0, int rows, float* sums) {
  for (int first = 0; first < groups; first += kGroups, ++row) {
    const int end = std::min(first + kGroups, groups);
    const float scale = half_to_float(row->scale[0]);
    const float minimum = kHasMinimum ? half_to_float(row->scale[kHasMinimum]) : 0.0f;
    int8_t quants[kGroups][kGroupSize];
    for (int g = first; g < end; ++g) {
      decode(row->quants[g - first], kHasMinimum ? 0 : -kInt4ZeroPoint, quants[g - first]);
    }
    for (int r = 0; r < rows; ++r) {
      float dots = 0.0f, totals = 0.0f;
      for (int g = first; g < end; ++g) {
        const int64_t index = int64_t{t0 + r} * groups + g;
        const int dot = dot_group(quants[g - first], x.quantized + index * kGroupSize);
        dots += x.scales[index] * static_cast<float>(dot);
        totals += x.totals[index];
      }
      sums[r] += scale * dots;
      if (kHasMinimum) sums[r] += minimum * totals;
    }
  }
}

// quants(g) and scale(g) are those of the row's group g.
template <typename Quants, typename Scale>
void add_int8_row(int groups, const Activations& x, int t0, int rows, float* sums, Quants quants,
                  Scale scale) {
  for (int g = 0; g < groups; ++g) {
    for (int r = 0; r < rows; ++r) {
      const int64_t index = int64_t{t0 + r} * groups + g;
      const int dot = dot_group(quants(g), x.quantized + index * kGroupSize);
      sums[r] += scale(g) * x.scales[index] * static_cast<float>(dot);
    }
  }
}

void add_int8_channel(const PackedMatrix& w, int n, const Activations& x, int t0, int rows,
                      float* sums) {
  const uint8_t* row = w.data + n * int8_channel_row_bytes(w.K);
  float scale;
  std::memcpy(&scale, row, sizeof(float));
  const int8_t* quants = reinterpret_cast<const int8_t*>(row + sizeof(float));
  add_int8_row(
      num_groups(w.K), x, t0, rows, sums, [=](int g) { return quants + g * kGroupSize; },
      [=](int) { return scale; });
}

// Sums of a tile's 16 channels over one row; decode(k, channel) gives the weight.
template <typename Decode>
void gemm_floats(int K, const Activations& x, int T, float* y, int64_t ld_y, int channels,
                 const float* scales, bool accumulate, Decode decode) {
  for (int t = 0; t < T; ++t) {
    const float* row = x.values + t * x.ld_values;
    float sums[kTileChannels] = {};
    for (int k = 0; k < K; ++k) {
      for (int c = 0; c < kTileChannels; ++c) sums[c] += decode(k, c) * row[k];
    }
    float* out = y + t * ld_y;
    for (int c = 0; c < channels; ++c) {
      const float sum = scales == nullptr ? sums[c] : sums[c] * scales[c];
      out[c] = accumulate ? out[c] + sum : sum;
    }
  }
}

// The float formats, whose tiles are those of Lanes512.
void gemm_float_tiles(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                      int tile_begin, int tile_end, bool accumulate) {
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int channels = std::min(kTileChannels, w.N - tile * kTileChannels);
    float* out = y + tile * kTileChannels;
    if (w.format == Format::kFp8) {
      const Fp8Tile* from =
          reinterpret_cast<const Fp8Tile*>(w.data + tile * fp8_tile_bytes<Lanes512>(w.K));
      gemm_floats(w.K, x, T, out, ld_y, channels, from->scales, accumulate,
                  [=](int k, int c) { return e4m3_to_half_scale(from->rows()[k].values[c]); });
    } else {
      const Bf16TileRow* from = reinterpret_cast<const Bf16TileRow*>(w.data) + int64_t{tile} * w.K;
      gemm_floats(w.K, x, T, out, ld_y, channels, nullptr, accumulate,
                  [=](int k, int c) { return bf16_to_float(from[k].values[c]); });
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
      x.totals[index] = x.scales[index] * x.sums[index];
    }
  }
}

void gemm_portable(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                   int tile_begin, int tile_end, bool accumulate) {
  if (!format_info(w.format).reads_integers) {
    return gemm_float_tiles(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
  const int begin = tile_begin * kTileChannels;
  const int end = std::min(tile_end * kTileChannels, w.N);
  const int64_t groups = num_groups(w.K);
  const auto over_channels = [&](auto add_row) {
    for_channels(T, y, ld_y, begin, end, accumulate, add_row);
  };
  if (w.format == Format::kInt8) {
    return over_channels([&](int t0, int rows, int n, float* sums) {
      const Int8Group* row = reinterpret_cast<const Int8Group*>(w.data) + n * groups;
      add_int8_row(
          groups, x, t0, rows, sums, [=](int g) { return row[g].quants; },
          [=](int g) { return half_to_float(row[g].scale); });
    });
  }
  if (w.format == Format::kInt8Channel) {
    return over_channels(
        [&](int t0, int rows, int n, float* sums) { add_int8_channel(w, n, x, t0, rows, sums); });
  }
  with_int4(w.format, [&]<int kGroups, bool kHasMinimum>() {
    using Group = Int4Group<kGroups, kHasMinimum>;
    over_channels([&](int t0, int rows, int n, float* sums) {
      const Group* row =
          reinterpret_cast<const Group*>(w.data + n * int4_bytes<Group, kGroups>(w.K));
      add_int4_row<kGroups, kHasMinimum>(row, groups, x, t0, rows, sums);
    });
  });
}

}  // namespace fulcrum
