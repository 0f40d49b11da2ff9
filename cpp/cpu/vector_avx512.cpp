// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_float.h"
#include "attention_int8.h"
#include "vector_attention.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512;
const VectorKernels kVectorKernels_avx512 = {"avx512",
                                             rms_norm,
                                             add,
                                             scale,
                                             gate,
                                             rotate,
                                             attend<FloatProducts<Bf16Kv>>,
                                             attend<Int8Products>,
                                             attend_segment<FloatProducts<Bf16Kv>>,
                                             attend_segment<Int8Products>,
                                             merge_segments,
                                             write_kv<Bf16Kv>,
                                             write_kv<QuadInt8Kv>};

}  // namespace fulcrum
