// The vector operations for one instruction set; the code is in vector_kernels.h.
#include "simd_portable.h"
#include "vector_kernels.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_portable;
const VectorKernels kVectorKernels_portable = {"portable", rms_norm, add,   scale,
                                               gate,       rotate,   attend};

}  // namespace fulcrum
