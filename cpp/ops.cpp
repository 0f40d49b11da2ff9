#include "ops.h"

#include <cstring>

namespace fulcrum {

extern const VectorKernels kVectorKernels_portable;
#if defined(__x86_64__)
extern const VectorKernels kVectorKernels_avx2;
extern const VectorKernels kVectorKernels_avx512;
#endif

const VectorKernels* vector_kernels(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return &kVectorKernels_portable;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return &kVectorKernels_avx2;
  if (std::strcmp(isa, "avx512") == 0) return &kVectorKernels_avx512;
#endif
  return nullptr;
}

namespace {

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace

void write_kv(const float* key, const float* value, int head_dim, int offset, uint16_t* key_block,
              uint16_t* value_block) {
  for (int d = 0; d < head_dim; ++d) key_block[d * kBlockSize + offset] = to_bf16(key[d]);
  uint16_t* row = value_block + offset * head_dim;
  for (int d = 0; d < head_dim; ++d) row[d] = to_bf16(value[d]);
}

}  // namespace fulcrum
