// Decodes the block types of GGUF to float. The arithmetic is that of the gguf package's
// reference, operation by operation, so that results are equal bit for bit. Called at load.
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "formats/float16.h"
#include "quantize.h"

namespace fulcrum {
namespace {

struct BlockInfo {
  const char* name;
  int values;
  int bytes;
};

// In the order of BlockType.
constexpr BlockInfo kBlocks[] = {
    {"F32", 1, 4},      {"F16", 1, 2},      {"BF16", 1, 2},     {"Q4_0", 32, 18},
    {"Q4_1", 32, 20},   {"Q5_0", 32, 22},   {"Q5_1", 32, 24},   {"Q8_0", 32, 34},
    {"Q2_K", 256, 84},  {"Q3_K", 256, 110}, {"Q4_K", 256, 144}, {"Q5_K", 256, 176},
    {"Q6_K", 256, 210},
};

template <typename T>
T load(const uint8_t* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

float load_half(const uint8_t* data) { return half_to_float(load<uint16_t>(data)); }

// Q4_0 to Q5_1: an fp16 scale, for the types with `kHasMinimum` an fp16 minimum, for 5 bits the
// fifth bits, then 16 bytes whose nibbles are the values i and i + 16.
template <int kBits, bool kHasMinimum>
void decode_legacy(const uint8_t* block, float* out) {
  constexpr int kOffset = kHasMinimum ? 0 : 1 << (kBits - 1);
  const float scale = load_half(block);
  const float minimum = kHasMinimum ? load_half(block + 2) : 0.0f;
  const uint8_t* rest = block + (kHasMinimum ? 4 : 2);
  const uint32_t fifth_bits = kBits == 5 ? load<uint32_t>(rest) : 0;
  const uint8_t* nibbles = rest + (kBits == 5 ? 4 : 0);
  for (int i = 0; i < 16; ++i) {
    int low = nibbles[i] & 15;
    int high = nibbles[i] >> 4;
    if (kBits == 5) {
      low |= (fifth_bits >> i & 1) << 4;
      high |= (fifth_bits >> (i + 16) & 1) << 4;
    }
    const float low_value = scale * static_cast<float>(low - kOffset);
    const float high_value = scale * static_cast<float>(high - kOffset);
    out[i] = kHasMinimum ? low_value + minimum : low_value;
    out[i + 16] = kHasMinimum ? high_value + minimum : high_value;
  }
}

void decode_q8_0(const uint8_t* block, float* out) {
  const float scale = load_half(block);
  for (int i = 0; i < 32; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * scale;
  }
}

// 16 sub-blocks of 16: scale and minimum of 4 bits each. Bits 2j of 32 bytes hold sub-blocks
// 2j and 2j + 1 of a half of the block.
void decode_q2_k(const uint8_t* block, float* out) {
  const uint8_t* scales = block;
  const uint8_t* quants = block + 16;
  const float d = load_half(block + 80);
  const float d_min = load_half(block + 82);
  for (int sub = 0; sub < 16; ++sub) {
    const float scale = d * static_cast<float>(scales[sub] & 15);
    const float minimum = d_min * static_cast<float>(scales[sub] >> 4);
    const uint8_t* bytes = quants + sub / 8 * 32 + sub % 2 * 16;
    const int shift = sub % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) {
      out[sub * 16 + i] = scale * static_cast<float>(bytes[i] >> shift & 3) - minimum;
    }
  }
}

// 16 sub-blocks of 16 with 6-bit scales: low nibbles in 8 bytes, high pairs of bits in 4. The
// third bit of the values is in a mask of its own and inverted.
void decode_q3_k(const uint8_t* block, float* out) {
  const uint8_t* mask = block;
  const uint8_t* quants = block + 32;
  const uint8_t* scales = block + 96;
  const float d = load_half(block + 108);
  for (int sub = 0; sub < 16; ++sub) {
    const int low = scales[sub % 8] >> (sub / 8 * 4) & 15;
    const int high = scales[8 + sub % 4] >> (sub / 4 * 2) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const uint8_t* bytes = quants + sub / 8 * 32 + sub % 2 * 16;
    const uint8_t* bits = mask + sub % 2 * 16;
    const int shift = sub % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) {
      const int third = (bits[i] >> (sub / 2) & 1) ^ 1;
      out[sub * 16 + i] = scale * static_cast<float>((bytes[i] >> shift & 3) - third * 4);
    }
  }
}

// Q4_K and Q5_K: 8 sub-blocks of 32. Bytes of 64 values hold an even sub-block in the low
// nibbles and the next in the high ones; bit j of the fifth bits belongs to sub-block j.
template <bool kHasFifthBit>
void decode_q45_k(const uint8_t* block, float* out) {
  const uint8_t* fifth_bits = block + 16;
  const uint8_t* quants = block + (kHasFifthBit ? 48 : 16);
  for (int sub = 0; sub < 8; ++sub) {
    const SubBlockScale scale = k_quant_scale(block, sub);
    const uint8_t* bytes = quants + sub / 2 * 32;
    const int shift = sub % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      int quant = bytes[i] >> shift & 15;
      if (kHasFifthBit) quant |= (fifth_bits[i] >> sub & 1) << 4;
      out[sub * 32 + i] = scale.scale * static_cast<float>(quant) - scale.minimum;
    }
  }
}

// 16 sub-blocks of 16 with 8-bit scales, values of 6 bits: low nibbles of 128 values in 64 bytes,
// high pairs of bits in 32.
void decode_q6_k(const uint8_t* block, float* out) {
  const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
  const float d = load_half(block + 208);
  for (int part = 0; part < 8; ++part) {  // of 32 values
    const uint8_t* low = block + part / 4 * 64 + part % 2 * 32;
    const uint8_t* high = block + 128 + part / 4 * 32;
    const int low_shift = part % 4 / 2 * 4;
    const int high_shift = part % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const float scale = d * static_cast<float>(scales[part * 2 + half]);
      for (int i = half * 16; i < half * 16 + 16; ++i) {
        const int quant = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        out[part * 32 + i] = scale * static_cast<float>(quant - 32);
      }
    }
  }
}

template <typename Decode>
void decode_blocks(BlockType type, const uint8_t* data, int64_t num_values, float* out,
                   Decode decode) {
  const BlockInfo& info = kBlocks[static_cast<int>(type)];
  for (int64_t i = 0; i < num_values; i += info.values, data += info.bytes) decode(data, out + i);
}

}  // namespace

Format parse_format(const std::string& name) {
  std::string known;
  for (const FormatInfo& info : kFormats) {
    if (name == info.name) return info.format;
    known.append(known.empty() ? "" : ", ").append(info.name);
  }
  throw std::invalid_argument("unknown format " + name + ": choose from " + known);
}

bool parse_block_type(const char* name, BlockType* type) {
  for (size_t i = 0; i < std::size(kBlocks); ++i) {
    if (std::strcmp(name, kBlocks[i].name) == 0) {
      *type = static_cast<BlockType>(i);
      return true;
    }
  }
  return false;
}

int block_values(BlockType type) { return kBlocks[static_cast<int>(type)].values; }

int block_bytes(BlockType type) { return kBlocks[static_cast<int>(type)].bytes; }

SubBlockScale k_quant_scale(const uint8_t* block, int sub) {
  // 12 bytes of 6-bit numbers: those of sub-blocks 0…3 in the low bits of bytes 0…3 (scales) and
  // 4…7 (minima), whose upper two bits extend the nibbles in bytes 8…11, of sub-blocks 4…7.
  const uint8_t* packed = block + 4;
  int scale, minimum;
  if (sub < 4) {
    scale = packed[sub] & 63;
    minimum = packed[sub + 4] & 63;
  } else {
    scale = (packed[sub + 4] & 15) | packed[sub - 4] >> 6 << 4;
    minimum = packed[sub + 4] >> 4 | packed[sub] >> 6 << 4;
  }
  return {load_half(block) * static_cast<float>(scale),
          load_half(block + 2) * static_cast<float>(minimum)};
}

void dequantize(BlockType type, const uint8_t* data, int64_t num_values, float* out) {
  const auto decode = [=](auto block) { decode_blocks(type, data, num_values, out, block); };
  switch (type) {
    case BlockType::kF32:
      std::memcpy(out, data, num_values * sizeof(float));
      return;
    case BlockType::kF16:
      for (int64_t i = 0; i < num_values; ++i) out[i] = load_half(data + i * 2);
      return;
    case BlockType::kBf16:
      for (int64_t i = 0; i < num_values; ++i) out[i] = bf16_to_float(load<uint16_t>(data + i * 2));
      return;
    case BlockType::kQ4_0:
      return decode(decode_legacy<4, false>);
    case BlockType::kQ4_1:
      return decode(decode_legacy<4, true>);
    case BlockType::kQ5_0:
      return decode(decode_legacy<5, false>);
    case BlockType::kQ5_1:
      return decode(decode_legacy<5, true>);
    case BlockType::kQ8_0:
      return decode(decode_q8_0);
    case BlockType::kQ2_K:
      return decode(decode_q2_k);
    case BlockType::kQ3_K:
      return decode(decode_q3_k);
    case BlockType::kQ4_K:
      return decode(decode_q45_k<false>);
    case BlockType::kQ5_K:
      return decode(decode_q45_k<true>);
    case BlockType::kQ6_K:
      return decode(decode_q6_k);
  }
}

}  // namespace fulcrum
