// Chooses quants, scales and minima for a row of weights: copied where the block type of the
// checkpoint fits the format, else searched for. Called at load, from several threads.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "formats/float16.h"

namespace fulcrum {
namespace {

constexpr float kMaxHalf = 65504.0f;

float load_half(const uint8_t* data) {
  uint16_t half;
  std::memcpy(&half, data, 2);
  return half_to_float(half);
}

// The 32 values of a 4- or 5-bit block: nibbles i and i + 16 of 16 bytes, and the fifth bits.
void unpack_block(const uint8_t* nibbles, uint32_t fifth_bits, int offset, uint8_t* quants) {
  for (int i = 0; i < 16; ++i) {
    const int low = (nibbles[i] & 15) | static_cast<int>(fifth_bits >> i & 1) << 4;
    const int high = nibbles[i] >> 4 | static_cast<int>(fifth_bits >> (i + 16) & 1) << 4;
    quants[i] = static_cast<uint8_t>(low - offset);
    quants[i + 16] = static_cast<uint8_t>(high - offset);
  }
}

// int8 groups that hold the block as it is. False for a block type that has none.
bool copy_to_int8(BlockType type, const uint8_t* row, int groups, uint8_t* quants, float* scales) {
  if (type != BlockType::kQ8_0 && type != BlockType::kQ5_0 && type != BlockType::kQ4_0) {
    return false;
  }
  for (int g = 0; g < groups; ++g, row += block_bytes(type), quants += kGroupSize) {
    scales[g] = load_half(row);
    if (type == BlockType::kQ8_0) {
      std::memcpy(quants, row + 2, kGroupSize);
    } else if (type == BlockType::kQ5_0) {
      uint32_t fifth_bits;
      std::memcpy(&fifth_bits, row + 2, 4);
      unpack_block(row + 6, fifth_bits, 16, quants);
    } else {
      unpack_block(row + 2, 0, 8, quants);
    }
  }
  return true;
}

// Q4_K: the quants are kept and only the products scale x sub-scale are rounded to fp16, an error
// far below a step. A search over the decoded values would move them off their grid.
void copy_q4_k(const uint8_t* row, int groups, uint8_t* quants, float* scales, float* minima) {
  for (int g = 0; g < groups; ++g, quants += kGroupSize) {
    const uint8_t* block = row + g / 8 * block_bytes(BlockType::kQ4_K);
    const SubBlockScale scale = k_quant_scale(block, g % 8);
    scales[g] = round_to_half(scale.scale);
    minima[g] = round_to_half(-scale.minimum);
    const uint8_t* bytes = block + 16 + g % 8 / 2 * 32;
    for (int i = 0; i < kGroupSize; ++i) {
      quants[i] = static_cast<uint8_t>(bytes[i] >> (g % 2 * 4) & 15);
    }
  }
}

// int4 groups with the quants of the block. False for a block type that has none.
bool copy_to_int4(BlockType type, const uint8_t* row, int groups, uint8_t* quants, float* scales,
                  float* minima) {
  if (type == BlockType::kQ4_K) {
    copy_q4_k(row, groups, quants, scales, minima);
    return true;
  }
  if (type != BlockType::kQ4_0 && type != BlockType::kQ4_1) return false;
  const bool has_minimum = type == BlockType::kQ4_1;
  for (int g = 0; g < groups; ++g, row += block_bytes(type), quants += kGroupSize) {
    scales[g] = load_half(row);
    minima[g] = has_minimum ? load_half(row + 2) : -8.0f * scales[g];
    // Beyond fp16: only a scale over 8188, which no weight matrix has.
    if (std::fabs(minima[g]) > kMaxHalf) return false;
    unpack_block(row + (has_minimum ? 4 : 2), 0, 0, quants);
  }
  return true;
}

void quantize_group_int8(const float* values, uint8_t* quants, float* scale) {
  float max = 0.0f;
  for (int i = 0; i < kGroupSize; ++i) max = std::max(max, std::fabs(values[i]));
  uint16_t half = float_to_half(max / 127.0f);
  // Among the coarse subnormal halves rounding down could cut off the largest value.
  if (half < 0x400 && half_to_float(half) * 127.5f < max) ++half;
  *scale = half_to_float(half);
  const float inverse = *scale > 0.0f ? 1.0f / *scale : 0.0f;
  for (int i = 0; i < kGroupSize; ++i) {
    // Shifted to positive numbers, so that truncation rounds to nearest.
    const float shifted = std::min(std::max(values[i] * inverse, -127.0f), 127.0f) + 128.5f;
    quants[i] = static_cast<uint8_t>(static_cast<int>(shifted) - 128);
  }
}

// Four floats: vectors of the compiler, so that the search is fast without an instruction set.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

constexpr int kVectors = kGroupSize / 4;
constexpr int kMaxRefits = 4;

float sum_lanes(Float4 v) { return v[0] + v[1] + (v[2] + v[3]); }

Float4 splat(float value) { return Float4{value, value, value, value}; }

struct Candidate {
  float scale;
  float minimum;
  float error;              // sum of squared differences
  Float4 quants[kVectors];  // whole numbers 0…15
};

// Rounds scale and minimum to fp16, then the values to the grid that these give.
void evaluate(const Float4* values, float scale, float minimum, Candidate* out) {
  out->scale = round_to_half(scale);
  out->minimum = round_to_half(minimum);
  const Float4 step = splat(out->scale), low = splat(out->minimum);
  const Float4 inverse = splat(out->scale > 0.0f ? 1.0f / out->scale : 0.0f);
  const Float4 half = splat(0.5f), zero = splat(0.0f), top = splat(15.0f);
  Float4 error = zero;
  for (int i = 0; i < kVectors; ++i) {
    Float4 level = (values[i] - low) * inverse + half;
    level = level > zero ? level : zero;
    level = level < top ? level : top;
    const Float4 quant = __builtin_convertvector(__builtin_convertvector(level, Int4), Float4);
    const Float4 difference = step * quant + low - values[i];
    error += difference * difference;
    out->quants[i] = quant;
  }
  out->error = sum_lanes(error);
}

// The line through (quant, value) with the least squared error. False where it does not rise.
bool fit_line(const Float4* values, const Float4* quants, float* scale, float* minimum) {
  Float4 sums[4] = {};
  for (int i = 0; i < kVectors; ++i) {
    sums[0] += quants[i];
    sums[1] += quants[i] * quants[i];
    sums[2] += values[i];
    sums[3] += quants[i] * values[i];
  }
  const float sum_q = sum_lanes(sums[0]), sum_qq = sum_lanes(sums[1]);
  const float sum_v = sum_lanes(sums[2]), sum_qv = sum_lanes(sums[3]);
  const float determinant = kGroupSize * sum_qq - sum_q * sum_q;
  if (determinant <= 0.0f) return false;
  *scale = (kGroupSize * sum_qv - sum_q * sum_v) / determinant;
  *minimum = (sum_v - *scale * sum_q) / kGroupSize;
  return *scale > 0.0f;
}

// Tries ranges narrower than that of the values, which trade a larger error at the ends for a finer
// step, then refits the best to its quants as long as that helps (Lloyd's iteration). The full
// range is the first candidate: never worse than plain rounding.
void quantize_group_int4(const float* group, uint8_t* quants, float* scale, float* minimum) {
  Float4 values[kVectors];
  std::memcpy(values, group, sizeof(values));
  Float4 lows = values[0], highs = values[0];
  for (int i = 1; i < kVectors; ++i) {
    lows = values[i] < lows ? values[i] : lows;
    highs = values[i] > highs ? values[i] : highs;
  }
  const float low = std::min(std::min(lows[0], lows[1]), std::min(lows[2], lows[3]));
  const float high = std::max(std::max(highs[0], highs[1]), std::max(highs[2], highs[3]));
  const float center = low / 2 + high / 2, range = high / 15 - low / 15;
  Candidate candidates[2];
  Candidate *best = &candidates[0], *other = &candidates[1];
  evaluate(values, range, low, best);
  for (const float width : {0.92f, 0.84f, 0.76f}) {
    const float step = range * width;
    evaluate(values, step, center - 7.5f * step, other);
    if (other->error < best->error) std::swap(best, other);
  }
  for (int refit = 0; refit < kMaxRefits; ++refit) {
    float fitted_scale, fitted_minimum;
    if (!fit_line(values, best->quants, &fitted_scale, &fitted_minimum)) break;
    evaluate(values, fitted_scale, fitted_minimum, other);
    if (!(other->error < best->error)) break;
    std::swap(best, other);
  }
  for (int i = 0; i < kGroupSize; ++i) quants[i] = static_cast<uint8_t>(best->quants[i / 4][i % 4]);
  *scale = best->scale;
  *minimum = best->minimum;
}

}  // namespace

void quantize_row(Format format, BlockType type, const uint8_t* row, int K, float* scratch,
                  float* values, uint8_t* quants, float* scales, float* minima) {
  if (format == Format::kBf16) return dequantize(type, row, K, values);
  const int groups = num_groups(K);
  if (format == Format::kInt8 && copy_to_int8(type, row, groups, quants, scales)) return;
  if (format == Format::kInt4 && copy_to_int4(type, row, groups, quants, scales, minima)) return;
  dequantize(type, row, K, scratch);
  for (int g = 0; g < groups; ++g) {
    const float* group = scratch + g * kGroupSize;
    uint8_t* group_quants = quants + g * kGroupSize;
    const int count = std::min(kGroupSize, K - g * kGroupSize);
    float padded[kGroupSize];
    if (count < kGroupSize) {  // the last value repeated: leaves the range of the group as it is
      std::fill(std::copy_n(group, count, padded), padded + kGroupSize, group[count - 1]);
      group = padded;
    }
    if (format == Format::kInt8) {
      quantize_group_int8(group, group_quants, scales + g);
    } else {
      quantize_group_int4(group, group_quants, scales + g, minima + g);
    }
    std::fill(group_quants + count, group_quants + kGroupSize, uint8_t{0});
  }
}

}  // namespace fulcrum
