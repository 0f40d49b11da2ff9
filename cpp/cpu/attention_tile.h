// What the parts of attention share: a tile's rows and what is known of them so far, and how rows
// are taken by groups. Written once over `Simd` (vector_kernels.h).
#pragma once

#include <algorithm>
#include <cfloat>

#include "vector_kernels.h"
#include "vector_kv.h"

namespace fulcrum {
namespace {

constexpr int kSpan = 16;               // keys of a KV block, or channels of values
constexpr int kParts = kSpan / kWidth;  // vectors in a span
constexpr int kChunkBlocks = kAttentionChunk / kBlockSize;
constexpr int kWholeTile = 0;  // the row group of products that take all rows of a tile at once
static_assert(kSpan == kBlockSize);

// What is known of a tile's rows so far.
struct Tile {
  float* scores;   // (rows, kAttentionChunk): scores, then probabilities as Products has them
  float* queries;  // (rows, head_dim), laid out by groups of rows as Products has them
  float* sums;     // (rows, head_dim): values weighted so far
  float* maximum;  // (rows,)
  float* total;    // (rows,): sum of probabilities, once a segment is computed
  float* totals;   // (rows, kWidth): the same by lanes, until then
  int num_rows;
};

// The columns of a chunk that a row sees, [low, high), of those that are computed.
struct SeenColumns {
  int low, high, num_columns;
};

// What products hold while a segment is computed: nothing, for most.
struct NoScope {
  explicit NoScope(const Tile&) {}
};

// `scratch` is the thread's; `state` holds the rest, attention_state_floats.
inline Tile tile_over(const AttentionUnit& unit, float* scratch, float* state) {
  const int num_rows = unit.num_tokens * unit.num_heads;
  float* maximum = state + int64_t{num_rows} * unit.head_dim;
  float* queries = scratch + kMaxTileRows * kAttentionChunk;
  float* totals = queries + kMaxTileRows * int64_t{unit.head_dim};
  return {scratch, queries, state, maximum, maximum + num_rows, totals, num_rows};
}

// Where the states begin in a thread's scratch memory, behind scores, queries and totals by lanes.
inline float* states_of(const AttentionUnit& unit, float* scratch) {
  return scratch + kMaxTileRows * (kAttentionChunk + int64_t{unit.head_dim} + kMostLanes);
}

inline const float* query_row(const AttentionUnit& unit, int row) {
  const int token = row / unit.num_heads, head = row % unit.num_heads;
  return unit.queries + token * unit.ld_queries + head * unit.head_dim;
}

// Calls op.template operator()<n>(row) for groups of kRows rows, then for those left.
template <int kRows, typename Op>
inline void for_row_groups(int num_rows, Op op, int row = 0) {
  for (; row + kRows <= num_rows; row += kRows) op.template operator()<kRows>(row);
  if constexpr (kRows > 1) {
    if (row < num_rows) for_row_groups<kRows - 1>(num_rows, op, row);
  }
}

// e^x for x <= 0, as the softmax needs it: 2^n * 2^f with |f| <= 1/2 and a polynomial of degree 5
// for 2^f, a minimax fit of relative error 1e-7. Below the normal range the result is about the
// smallest normal number; NaN stays NaN.
inline Vector exp_negative(Vector x) {
  x = Simd::max(Simd::set(-126.f), Simd::mul(x, Simd::set(1.44269504f)));
  const Vector n = Simd::round(x);
  const Vector f = Simd::sub(x, n);
  Vector p = Simd::set(1.32647273e-3f);
  p = Simd::fma(p, f, Simd::set(9.67151299e-3f));
  p = Simd::fma(p, f, Simd::set(5.55073358e-2f));
  p = Simd::fma(p, f, Simd::set(2.40222424e-1f));
  p = Simd::fma(p, f, Simd::set(6.93147004e-1f));
  p = Simd::fma(p, f, Simd::set(1.f));
  return Simd::scale_by_exp2(p, n);
}

// e^(former - maximum): what is kept of sums under a new maximum, which most often is the former.
inline float factor_of(float former, float maximum) {
  if (former == maximum) return 1.f;
  return Simd::first(exp_negative(Simd::set(former - maximum)));
}

}  // namespace
}  // namespace fulcrum
