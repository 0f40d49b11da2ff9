// The elements of a KV block: how a dtype is written and read, written once over `Simd`
// (vector_kernels.h). Attention takes one of these as a template parameter.
#pragma once

#include <cfloat>
#include <cstring>

#include "vector_kernels.h"

namespace fulcrum {
namespace {

// How the elements of a KV block are written and read (KvBlockLayout): keys (head_dim, kBlockSize),
// values (kBlockSize, head_dim). Products that want another order have elements of their own.
struct Bf16Kv {
  using Element = uint16_t;
  static constexpr KvDtype kDtype = KvDtype::kBf16;
  static constexpr bool kHasScales = false;

  static Vector load(const Element* p) { return Simd::load_bf16(p); }

  static Element round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<Element>(bits >> 16 | 0x40);  // NaN
    bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    return static_cast<Element>(bits >> 16);
  }

  // A token's key and value into slot `offset` of its block.
  static void write(const float* key, const float* value, int head_dim, int offset, Element* keys,
                    Element* values, float*, float*) {
    for (int d = 0; d < head_dim; ++d) {
      keys[d * kBlockSize + offset] = round(key[d]);
      values[offset * head_dim + d] = round(value[d]);
    }
  }
};

struct Int8Kv {
  using Element = int8_t;
  static constexpr KvDtype kDtype = KvDtype::kInt8;
  static constexpr bool kHasScales = true;

  static Vector load(const Element* p) { return Simd::load_int8(p); }

  // Sets the scale of a head's values and returns its inverse. A head with a value that is no
  // number gets a scale that is none, so that the fault shows in the logits; one too small for a
  // normal scale becomes zero. Then the inverse is 0.
  static float scale_of(const float* x, int head_dim, float* scale) {
    Vector largest = Simd::zero(), faults = Simd::zero();
    for (int d = 0; d < head_dim; d += kWidth) {
      const Vector v = Simd::load(x + d);
      largest = Simd::max(largest, Simd::max(v, Simd::sub(Simd::zero(), v)));
      faults = Simd::fma(v, Simd::zero(), faults);  // NaN where v is infinite or NaN
    }
    const float maximum = Simd::max_of(largest), fault = Simd::sum(faults);
    const bool representable = fault == 0 && maximum >= 127 * FLT_MIN;
    *scale = representable ? maximum / 127 : fault;
    return representable ? 127 / maximum : 0;
  }

  // The kWidth values from x on; zeros where the inverse is 0.
  static void quantize(const float* x, float inverse, Element* out) {
    float quants[kWidth] = {};
    if (inverse != 0)
      Simd::store(quants, Simd::round(Simd::mul(Simd::load(x), Simd::set(inverse))));
    for (int i = 0; i < kWidth; ++i) out[i] = static_cast<Element>(quants[i]);
  }

  static void write(const float* key, const float* value, int head_dim, int offset, Element* keys,
                    Element* values, float* key_scales, float* value_scales) {
    const float key_inverse = scale_of(key, head_dim, key_scales + offset);
    const float value_inverse = scale_of(value, head_dim, value_scales + offset);
    for (int d = 0; d < head_dim; d += kWidth) {
      Element quants[kWidth];
      quantize(key + d, key_inverse, quants);
      for (int i = 0; i < kWidth; ++i) keys[(d + i) * kBlockSize + offset] = quants[i];
      quantize(value + d, value_inverse, values + offset * head_dim + d);
    }
  }
};

template <typename Kv>
void write_kv(const float* key, const float* value, int head_dim, int offset, uint8_t* block) {
  using Element = typename Kv::Element;
  const KvBlockLayout layout(Kv::kDtype, head_dim);
  Kv::write(key, value, head_dim, offset, reinterpret_cast<Element*>(block),
            reinterpret_cast<Element*>(block + layout.values),
            reinterpret_cast<float*>(block + layout.key_scales),
            reinterpret_cast<float*>(block + layout.value_scales));
}

}  // namespace
}  // namespace fulcrum
