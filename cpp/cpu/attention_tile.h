// What the parts of attention share: a tile's rows and what is known of them so far, and how rows
// are taken by groups. Written once over `Simd` (vector_kernels.h).
#pragma once

#include <algorithm>

#include "vector_kernels.h"
#include "vector_kv.h"

namespace fulcrum {
namespace {

constexpr int kSpan = 16;               // keys of a KV block, or channels of values
constexpr int kParts = kSpan / kWidth;  // vectors in a span
constexpr int kChunkBlocks = kAttentionChunk / kBlockSize;
// Rows that share each load of K and V: their chains of additions hide the latency of one, and the
// sums of all fit the registers.
constexpr int kRowGroup = kWidth == 16 ? 12 : 4;
static_assert(kSpan == kBlockSize);

// What is known of a tile's rows so far.
struct Tile {
  float* scores;   // (rows, kAttentionChunk): scores, then probabilities as Products has them
  float* queries;  // (rows, head_dim), laid out by groups of rows as Products has them
  float* sums;     // (rows, head_dim): values weighted so far
  float* maximum;  // (rows,)
  float* total;    // (rows,): sum of probabilities so far
  int num_rows;
};

// `scratch` is the thread's; `state` holds the rest, attention_state_floats.
inline Tile tile_over(const AttentionUnit& unit, float* scratch, float* state) {
  const int num_rows = unit.num_tokens * unit.num_heads;
  float* maximum = state + int64_t{num_rows} * unit.head_dim;
  float* queries = scratch + kMaxTileRows * kAttentionChunk;
  return {scratch, queries, state, maximum, maximum + num_rows, num_rows};
}

// Where the states begin in a thread's scratch memory, behind scores and queries.
inline float* states_of(const AttentionUnit& unit, float* scratch) {
  return scratch + kMaxTileRows * (kAttentionChunk + int64_t{unit.head_dim});
}

inline const float* query_row(const AttentionUnit& unit, int row) {
  const int token = row / unit.num_heads, head = row % unit.num_heads;
  return unit.queries + token * unit.ld_queries + head * unit.head_dim;
}

// Calls op.template operator()<n>(row) for groups of kRowGroup rows, then for those left.
template <int kRows = kRowGroup, typename Op>
inline void for_row_groups(int num_rows, Op op, int row = 0) {
  for (; row + kRows <= num_rows; row += kRows) op.template operator()<kRows>(row);
  if constexpr (kRows > 1) {
    if (row < num_rows) for_row_groups<kRows - 1>(num_rows, op, row);
  }
}

// Scores of a block's keys, vector `part` of them, with the scales of those that have any.
template <typename Kv>
inline Vector scale_scores(const AttentionUnit& unit, const uint8_t* block, int part,
                           Vector scores) {
  if constexpr (!Kv::kHasScales) return scores;
  const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
  const float* scales = reinterpret_cast<const float*>(block + layout.key_scales);
  return Simd::mul(scores, Simd::load(scales + part * kWidth));
}

}  // namespace
}  // namespace fulcrum
