// Chooses quants, scales and minima for a row of weights: copied where the block type of the
// checkpoint fits the format, else searched for. Called at load, from several threads.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/float16.h"
#include "formats/fp8.h"
#include "formats/int4.h"
#include "quantize_int4.h"

namespace fulcrum {
namespace {

constexpr float kMaxHalf = 65504.0f;
constexpr float kSmallestMax = 1e-30f;  // its inverse stays finite; smaller channels become zero

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

// int4 groups with the quants of the block. False for a format or block type that has none.
bool copy_to_int4(Format format, BlockType type, const uint8_t* row, int groups, uint8_t* quants,
                  float* scales, float* minima) {
  const bool is_symmetric = format == Format::kInt4Symmetric;
  if (format != Format::kInt4 && !(is_symmetric && type == BlockType::kQ4_0)) return false;
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
    if (!is_symmetric && std::fabs(minima[g]) > kMaxHalf) return false;
    unpack_block(row + (has_minimum ? 4 : 2), 0, 0, quants);
  }
  return true;
}

uint8_t round_to_int8(float value) {
  // Shifted to positive numbers, so that truncation rounds to nearest.
  const float shifted = std::min(std::max(value, -127.0f), 127.0f) + 128.5f;
  return static_cast<uint8_t>(static_cast<int>(shifted) - 128);
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
    quants[i] = round_to_int8(values[i] * inverse);
  }
}

void quantize_channel(Format format, const float* values, int K, uint8_t* quants, float* scale) {
  float max = 0.0f;
  for (int k = 0; k < K; ++k) max = std::max(max, std::fabs(values[k]));
  const bool is_zero = max < kSmallestMax;
  const float top = format == Format::kFp8 ? kFp8Max : 127.0f;
  *scale = is_zero ? 0.0f : max / top;
  const float inverse = is_zero ? 0.0f : top / max;
  for (int k = 0; k < K; ++k) {
    const float value = values[k] * inverse;
    quants[k] = format == Format::kFp8 ? float_to_e4m3(value) : round_to_int8(value);
  }
}

}  // namespace

void quantize_row(Format format, BlockType type, const uint8_t* row, int K, float* scratch,
                  float* values, uint8_t* quants, float* scales, float* minima) {
  if (format == Format::kBf16) return dequantize(type, row, K, values);
  std::fill(quants + K, quants + padded_k(K), uint8_t{0});
  const int groups = num_groups(K);
  if (format == Format::kInt8 && copy_to_int8(type, row, groups, quants, scales)) return;
  if (copy_to_int4(format, type, row, groups, quants, scales, minima)) return;
  dequantize(type, row, K, scratch);
  if (format == Format::kFp8 || format == Format::kInt8Channel) {
    return quantize_channel(format, scratch, K, quants, scales);
  }
  const int size =
      format == Format::kInt8
          ? kGroupSize
          : with_int4(format, []<int kGroups, bool>() { return kGroups * kGroupSize; });
  const bool is_symmetric = format != Format::kInt8 &&
                            with_int4(format, []<int, bool kHasMinimum>() { return !kHasMinimum; });
  for (int k = 0, i = 0; k < K; k += size, ++i) {
    const int count = std::min(size, K - k);
    float padded[kMaxInt4Group];
    // The last value repeated: leaves the range of the group as it is.
    std::fill(std::copy_n(scratch + k, count, padded), padded + size, scratch[k + count - 1]);
    uint8_t group[kMaxInt4Group];
    if (format == Format::kInt8) {
      quantize_group_int8(padded, group, scales + i);
    } else {
      quantize_group_int4(padded, size, is_symmetric, group, scales + i, minima + i);
    }
    std::copy_n(group, count, quants + k);
  }
}

}  // namespace fulcrum
