// The search for the scale and minimum of an int4 group, the slow part of quantizing at load.
#pragma once

#include <cstdint>

namespace fulcrum {

constexpr int kMaxInt4Group = 128;

// Chooses quants (0…15), scale and minimum, which is -8 * scale where the group is symmetric, with
// the least squared error that the search finds, never more than plain rounding of the range has.
// Both are rounded to fp16. size: a multiple of 4, at most kMaxInt4Group.
void quantize_group_int4(const float* group, int size, bool is_symmetric, uint8_t* quants,
                         float* scale, float* minimum);

}  // namespace fulcrum
