// The elements of a KV block: how a dtype is written and read, written once over `Simd`
// (vector_kernels.h). Attention takes one of these as a template parameter.
#pragma once

#include <cfloat>
#include <cstring>

#include "vector_kernels.h"

namespace fulcrum {
namespace {

// How the elements of a KV block are written and read (KvBlockLayout).
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

  // Element i of x goes to out[i * stride].
  static void write(const float* x, int head_dim, Element* out, int stride, float*) {
    for (int d = 0; d < head_dim; ++d) out[d * stride] = round(x[d]);
  }
};

struct Int8Kv {
  using Element = int8_t;
  static constexpr KvDtype kDtype = KvDtype::kInt8;
  static constexpr bool kHasScales = true;

  static Vector load(const Element* p) { return Simd::load_int8(p); }

  // A head with a value that is no number gets a scale that is none, so that the fault shows in
  // the logits; one too small for a normal scale becomes zero.
  static void write(const float* x, int head_dim, Element* out, int stride, float* scale) {
    Vector largest = Simd::zero(), faults = Simd::zero();
    for (int d = 0; d < head_dim; d += kWidth) {
      const Vector v = Simd::load(x + d);
      largest = Simd::max(largest, Simd::max(v, Simd::sub(Simd::zero(), v)));
      faults = Simd::fma(v, Simd::zero(), faults);  // NaN where v is infinite or NaN
    }
    const float maximum = Simd::max_of(largest), fault = Simd::sum(faults);
    const bool representable = fault == 0 && maximum >= 127 * FLT_MIN;
    *scale = representable ? maximum / 127 : fault;
    const Vector inverse = Simd::set(representable ? 127 / maximum : 0);
    for (int d = 0; d < head_dim; d += kWidth) {
      float quants[kWidth] = {};
      if (representable) {
        Simd::store(quants, Simd::round(Simd::mul(Simd::load(x + d), inverse)));
      }
      for (int i = 0; i < kWidth; ++i) out[(d + i) * stride] = static_cast<Element>(quants[i]);
    }
  }
};

template <typename Kv>
void write_kv(const float* key, const float* value, int head_dim, int offset, uint8_t* block) {
  using Element = typename Kv::Element;
  const KvBlockLayout layout(Kv::kDtype, head_dim);
  float* key_scales = reinterpret_cast<float*>(block + layout.key_scales);
  float* value_scales = reinterpret_cast<float*>(block + layout.value_scales);
  Element* values = reinterpret_cast<Element*>(block + layout.values);
  Kv::write(key, head_dim, reinterpret_cast<Element*>(block) + offset, kBlockSize,
            key_scales + offset);
  Kv::write(value, head_dim, values + offset * head_dim, 1, value_scales + offset);
}

}  // namespace
}  // namespace fulcrum
