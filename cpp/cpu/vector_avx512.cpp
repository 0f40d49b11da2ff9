// The vector operations for one instruction set; the code is in vector_kernels.h.
#include "simd_avx512.h"
#include "vector_kernels.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512;
const VectorKernels kVectorKernels_avx512 = {"avx512", rms_norm, add, scale, gate, rotate, attend};

}  // namespace fulcrum
