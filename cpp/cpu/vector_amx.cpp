// The vector operations for one instruction set; the code is in the headers.
#include "simd_avx512.h"

// Need Simd before them.
#include "attention_amx.h"
#include "attention_int8.h"
#include "vector_attention.h"

namespace fulcrum {

extern const VectorKernels kVectorKernels_amx;
const VectorKernels kVectorKernels_amx = {"amx",
                                          rms_norm,
                                          add,
                                          scale,
                                          gate,
                                          rotate,
                                          attend<AmxProducts>,
                                          attend<Int8Products>,
                                          attend_segment<AmxProducts>,
                                          attend_segment<Int8Products>,
                                          merge_segments,
                                          write_kv<PairedBf16Kv>,
                                          write_kv<QuadInt8Kv>};

}  // namespace fulcrum
