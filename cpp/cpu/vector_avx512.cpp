// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_float.h"
#include "attention_int8.h"
#include "vector_table.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512;
const VectorKernels kVectorKernels_avx512 =
    vector_table<FloatProducts<Bf16Kv>, Int8Products>("avx512");

}  // namespace fulcrum
