// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_amx.h"
#include "attention_int8.h"
#include "vector_table.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_amx;
const VectorKernels kVectorKernels_amx = vector_table<AmxProducts, Int8Products>("amx");

}  // namespace fulcrum
