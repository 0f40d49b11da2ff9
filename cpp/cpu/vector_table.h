// The table of vector operations (ops.h) of one instruction set. Each vector_<isa>.cpp includes its
// simd header and its products of attention, then this file.
#pragma once

#include "vector_attention.h"

namespace fulcrum {
namespace {

// Products: of attention over a cache in bf16, and over one in int8.
template <typename Bf16, typename Int8>
constexpr VectorKernels vector_table(const char* isa) {
  return {.isa = isa,
          .rms_norm = rms_norm,
          .add = add,
          .scale = scale,
          .gate = gate,
          .rotate = rotate,
          .attend_bf16 = attend<Bf16>,
          .attend_int8 = attend<Int8>,
          .attend_segment_bf16 = attend_segment<Bf16>,
          .attend_segment_int8 = attend_segment<Int8>,
          .merge_segments = merge_segments,
          .write_kv_bf16 = write_kv<typename Bf16::Kv>,
          .write_kv_int8 = write_kv<typename Int8::Kv>};
}

}  // namespace
}  // namespace fulcrum
