// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_bf16.h"
#include "attention_int8.h"
#include "vector_table.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512_bf16;
const VectorKernels kVectorKernels_avx512_bf16 =
    vector_table<Bf16Products, Int8Products>("avx512-bf16");

}  // namespace fulcrum
