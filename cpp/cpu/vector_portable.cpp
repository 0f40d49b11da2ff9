// The vector operations for one instruction set; the code is in the headers.
#include "simd_portable.h"

// Need Simd before them.
#include "attention_float.h"
#include "vector_table.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_portable;
const VectorKernels kVectorKernels_portable =
    vector_table<FloatProducts<Bf16Kv>, FloatProducts<Int8Kv>>("portable");

}  // namespace fulcrum
