// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_bf16.h"
#include "vector_attention.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512_bf16;
const VectorKernels kVectorKernels_avx512_bf16 = {"avx512-bf16",
                                                  rms_norm,
                                                  add,
                                                  scale,
                                                  gate,
                                                  rotate,
                                                  attend<Bf16Products<Bf16Kv>>,
                                                  attend<Bf16Products<Int8Kv>>,
                                                  attend_segment<Bf16Products<Bf16Kv>>,
                                                  attend_segment<Bf16Products<Int8Kv>>,
                                                  merge_segments,
                                                  write_kv<Bf16Kv>,
                                                  write_kv<Int8Kv>};

}  // namespace fulcrum
