#include "ops.h"

#include <cstring>

namespace fulcrum {

extern const VectorKernels kVectorKernels_portable;
#if defined(__x86_64__)
extern const VectorKernels kVectorKernels_avx2;
extern const VectorKernels kVectorKernels_avx512;
extern const VectorKernels kVectorKernels_avx512_bf16;
extern const VectorKernels kVectorKernels_amx;
#endif

const VectorKernels* vector_kernels(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return &kVectorKernels_portable;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return &kVectorKernels_avx2;
  if (std::strcmp(isa, "avx512") == 0) return &kVectorKernels_avx512;
  if (std::strcmp(isa, "avx512-bf16") == 0) return &kVectorKernels_avx512_bf16;
  if (std::strcmp(isa, "amx") == 0) return &kVectorKernels_amx;
#endif
  return nullptr;
}

}  // namespace fulcrum
