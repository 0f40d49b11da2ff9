// The vector operations for one instruction set; the code is in vector_kernels.h.
#include "simd_avx2.h"
#include "vector_kernels.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx2;
const VectorKernels kVectorKernels_avx2 = {"avx2", rms_norm, add, scale, gate, rotate, attend};

}  // namespace fulcrum
