// The weight formats by name, and what code that is not a kernel needs to know of each. A new
// format is a row here, a header with its layout, and a kernel per instruction set.
#pragma once

#include <cstdint>

namespace fulcrum {

enum class Format : uint8_t {
  kBf16,
  kFp8,
  kInt8,
  kInt8Channel,
  kInt4,
  kInt4G64,
  kInt4G128,
  kInt4Symmetric,
  kInt4SymmetricG64,
  kInt4SymmetricG128,
};

struct FormatInfo {
  const char* name;
  Format format;
  bool reads_integers;  // activations in their int8 form
  int quant_bits;       // of the quants that pack takes; 0: it takes the values themselves
};

static constexpr FormatInfo kFormats[] = {
    {"bf16", Format::kBf16, false, 0},
    {"fp8", Format::kFp8, false, 8},
    {"int8", Format::kInt8, true, 8},
    {"int8-channel", Format::kInt8Channel, true, 8},
    {"int4", Format::kInt4, true, 4},
    {"int4-g64", Format::kInt4G64, true, 4},
    {"int4-g128", Format::kInt4G128, true, 4},
    {"int4-sym", Format::kInt4Symmetric, true, 4},
    {"int4-sym-g64", Format::kInt4SymmetricG64, true, 4},
    {"int4-sym-g128", Format::kInt4SymmetricG128, true, 4},
};

// The rows are in the order of the enumeration.
static constexpr const FormatInfo& format_info(Format format) {
  return kFormats[static_cast<int>(format)];
}

}  // namespace fulcrum
