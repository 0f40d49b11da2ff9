// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_bf16.h"
#include "attention_int8.h"
#include "vector_attention.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_avx512_bf16;
const VectorKernels kVectorKernels_avx512_bf16 = {"avx512-bf16",
                                                  rms_norm,
                                                  add,
                                                  scale,
                                                  gate,
                                                  rotate,
                                                  attend<Bf16Products>,
                                                  attend<Int8Products>,
                                                  attend_segment<Bf16Products>,
                                                  attend_segment<Int8Products>,
                                                  merge_segments,
                                                  write_kv<PairedBf16Kv>,
                                                  write_kv<QuadInt8Kv>};

}  // namespace fulcrum
