// From a checkpoint's values to the quants, scales and minima that LinearKernels::pack takes.
#pragma once

#include <cstdint>
#include <string>

#include "linear.h"

namespace fulcrum {

// Block types of GGUF, and the plain float types of safetensors.
enum class BlockType : uint8_t {
  kF32,
  kF16,
  kBf16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K
};

// The format of a name (formats/formats.h). Throws std::invalid_argument for another.
Format parse_format(const std::string& name);

// Returns false for an unknown name. Names are GGUF's ("Q4_K", "F16", …).
bool parse_block_type(const char* name, BlockType* type);
int block_values(BlockType type);  // values in a block: 1, 32 or 256
int block_bytes(BlockType type);

// Decodes num_values (a multiple of block_values) to float.
void dequantize(BlockType type, const uint8_t* data, int64_t num_values, float* out);

// What a sub-block of 32 values of a Q4_K or Q5_K block (`sub`: 0…7) is multiplied by, and what is
// subtracted from it.
struct SubBlockScale {
  float scale;
  float minimum;
};
SubBlockScale k_quant_scale(const uint8_t* block, int sub);

// One row of a checkpoint (K values of `type`) to the row form of `format` that pack takes: quants
// (padded_k(K)), scales and minima (num_groups(K)), or values (K) for kBf16. Exact where the format
// can hold the source (Q4_0, Q4_1 → kInt4; Q4_0 → kInt4Symmetric; Q4_0, Q5_0, Q8_0 → kInt8; bf16 →
// kBf16). Q4_K → kInt4 keeps the quants and rounds the scales to fp16. Else rounded: int8 and fp8
// by the largest |w| that shares a scale; int4 by a search for the least squared error. `scratch`
// holds K floats. Scales and minima are rounded to what the packed format stores.
void quantize_row(Format format, BlockType type, const uint8_t* row, int K, float* scratch,
                  float* values, uint8_t* quants, float* scales, float* minima);

}  // namespace fulcrum
