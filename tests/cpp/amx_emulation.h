// The tile instructions of AMX in plain C++, for machines without them. A thread has its own
// registers, as in hardware. Included by avx512_emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "formats/float16.h"

namespace emulated_amx {

struct Register {
  int rows = 0, row_bytes = 0;
  uint8_t data[16][64] = {};

  void clear() { std::memset(data, 0, sizeof(data)); }
  float value(int row, int column) const {
    float result;
    std::memcpy(&result, data[row] + 4 * column, 4);
    return result;
  }
};

inline thread_local Register registers[8];

// The configuration that ldtilecfg reads: 64 bytes, row lengths from byte 16 on, rows from 48 on.
inline void configure(const void* shapes) {
  const auto* bytes = static_cast<const uint8_t*>(shapes);
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    registers[i] = {.rows = bytes[48 + i], .row_bytes = row_bytes};
  }
}

inline void release() {
  for (Register& r : registers) r = {};
}

inline void load(Register& r, const void* base, int64_t stride) {
  r.clear();
  for (int row = 0; row < r.rows; ++row) {
    std::memcpy(r.data[row], static_cast<const uint8_t*>(base) + row * stride, r.row_bytes);
  }
}

inline void store(const Register& r, void* base, int64_t stride) {
  for (int row = 0; row < r.rows; ++row) {
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, r.data[row], r.row_bytes);
  }
}

inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline float bf16_at(const uint8_t* row, int index) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * index, 2);
  return flushed(fulcrum::bf16_to_float(bits));
}

// tdpbf16ps as Intel's manual describes it: even and odd products are added up apart, then to the
// sums. Shapes that do not fit would fault.
inline void multiply_bf16(Register& sums, const Register& a, const Register& b) {
  if (sums.rows != a.rows || sums.row_bytes != b.row_bytes || a.row_bytes != 4 * b.rows) {
    std::abort();
  }
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      float parts[2] = {0, 0};
      for (int k = 0; k < b.rows; ++k) {
        for (int part = 0; part < 2; ++part) {
          const float x = bf16_at(a.data[m], 2 * k + part), y = bf16_at(b.data[k], 2 * n + part);
          parts[part] = flushed(std::fma(x, y, parts[part]));
        }
      }
      const float sum = flushed(flushed(sums.value(m, n)) + flushed(parts[0] + parts[1]));
      std::memcpy(sums.data[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) emulated_amx::configure(shapes)
#define _tile_release() emulated_amx::release()
#define _tile_zero(r) emulated_amx::registers[r].clear()
#define _tile_loadd(r, base, stride) emulated_amx::load(emulated_amx::registers[r], base, stride)
#define _tile_stored(r, base, stride) emulated_amx::store(emulated_amx::registers[r], base, stride)
#define _tile_dpbf16ps(sums, a, b)                                                       \
  emulated_amx::multiply_bf16(emulated_amx::registers[sums], emulated_amx::registers[a], \
                              emulated_amx::registers[b])
