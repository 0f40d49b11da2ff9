// The vector operations for one instruction set; the code is in the headers.
#include "simd_portable.h"

// Need Simd before them.
#include "attention_float.h"
#include "vector_attention.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_portable;
const VectorKernels kVectorKernels_portable = {"portable",
                                               rms_norm,
                                               add,
                                               scale,
                                               gate,
                                               rotate,
                                               attend<FloatProducts<Bf16Kv>>,
                                               attend<FloatProducts<Int8Kv>>,
                                               attend_segment<FloatProducts<Bf16Kv>>,
                                               attend_segment<FloatProducts<Int8Kv>>,
                                               merge_segments,
                                               write_kv<Bf16Kv>,
                                               write_kv<Int8Kv>};

}  // namespace fulcrum
