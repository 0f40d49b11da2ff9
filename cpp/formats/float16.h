// Conversions between float and the two 16-bit float types. Bits only: no instruction set is
// assumed, and loops over them vectorise. Not for files compiled with ISA flags, whose copies of
// these inline functions the linker could pick for everybody.
#pragma once

#include <bit>
#include <cstdint>

namespace fulcrum {

// Exact, subnormal halves, infinities and NaNs included; independent of flush-to-zero modes.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t rebias = 112u << 23;
  uint32_t bits = (magnitude << 13) + rebias;
  bits += magnitude >= 0x7c00u ? rebias : 0u;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  bits = magnitude < 0x400u ? subnormal : bits;
  return std::bit_cast<float>(bits | (half & 0x8000u) << 16);
}

// Rounds to nearest even; beyond the range of fp16 it gives the largest finite value, so that a
// weight never becomes infinite.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7bffu);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

inline float round_to_half(float value) { return half_to_float(float_to_half(value)); }

inline float bf16_to_float(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

// Rounds to nearest even. A NaN stays one.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace fulcrum
