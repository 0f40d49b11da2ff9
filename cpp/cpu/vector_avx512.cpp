// The vector operations for one instruction set; the code is in vector_kernels.h and
// vector_attention.h, which need its Simd before them.
#include "simd_avx512.h"
#include "vector_attention.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512;
const VectorKernels kVectorKernels_avx512 = {"avx512",
                                             rms_norm,
                                             add,
                                             scale,
                                             gate,
                                             rotate,
                                             attend<Bf16Kv>,
                                             attend<Int8Kv>,
                                             attend_segment<Bf16Kv>,
                                             attend_segment<Int8Kv>,
                                             merge_segments,
                                             write_kv<Bf16Kv>,
                                             write_kv<Int8Kv>};

}  // namespace fulcrum
