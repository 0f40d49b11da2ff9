// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx2.h"

// Need Simd before them.
#include "attention_float.h"
#include "vector_table.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx2;
const VectorKernels kVectorKernels_avx2 =
    vector_table<FloatProducts<Bf16Kv>, FloatProducts<Int8Kv>>("avx2");

}  // namespace fulcrum
