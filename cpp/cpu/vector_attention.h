// Attention of ops.h, written once over `Simd` (vector_kernels.h) and over the elements of the KV
// blocks (vector_kv.h), so that their dtype is chosen with the function, not inside of it.
#pragma once

#include <algorithm>
#include <cfloat>

#include "vector_kernels.h"
#include "vector_kv.h"

namespace fulcrum {
namespace {

constexpr int kSpan = 16;               // floats of a register block: a KV block, a sixteenth of V
constexpr int kParts = kSpan / kWidth;  // vectors in a span
constexpr int kChunkBlocks = kAttentionChunk / kBlockSize;
// Rows that share each load of K and V: their chains of additions hide the latency of one, and the
// sums of all fit the registers.
constexpr int kRowGroup = kWidth == 16 ? 12 : 4;
static_assert(kSpan == kBlockSize);

// What is known of a tile's rows so far.
struct Tile {
  float* scores;   // (rows, kAttentionChunk): scores, then probabilities
  float* queries;  // by groups of rows (for_row_groups): (head_dim, rows of the group)
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

inline float exp_scalar(float x) {
  float values[kWidth] = {x};
  Simd::store(values, exp(Simd::load(values)));
  return values[0];
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

// Lays the queries out so that a group's rows are read side by side.
inline void pack_queries(const AttentionUnit& unit, const Tile& tile) {
  for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
    float* packed = tile.queries + int64_t{row} * unit.head_dim;
    for (int r = 0; r < kRows; ++r) {
      const float* query = query_row(unit, row + r);
      for (int d = 0; d < unit.head_dim; ++d) packed[d * kRows + r] = query[d];
    }
  });
}

// scores[row, 0:16] = query[row] · keys of one block, for kRows rows.
template <typename Kv, int kRows>
inline void score_block(const AttentionUnit& unit, const Tile& tile, int row, const uint8_t* block,
                        int column) {
  const auto* keys = reinterpret_cast<const typename Kv::Element*>(block);
  const float* queries = tile.queries + int64_t{row} * unit.head_dim;
  Vector acc[kRows][kParts];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::zero();
  }
  for (int d = 0; d < unit.head_dim; ++d, queries += kRows) {
    Vector key[kParts];
    for (int p = 0; p < kParts; ++p) key[p] = Kv::load(keys + d * kSpan + p * kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vector q = Simd::set(queries[r]);
      for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::fma(q, key[p], acc[r][p]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.scores + (row + r) * kAttentionChunk + column;
    for (int p = 0; p < kParts; ++p) {
      if constexpr (Kv::kHasScales) {
        const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
        const float* scales = reinterpret_cast<const float*>(block + layout.key_scales);
        acc[r][p] = Simd::mul(acc[r][p], Simd::load(scales + p * kWidth));
      }
      Simd::store(out + p * kWidth, acc[r][p]);
    }
  }
}

// sums[row, span] = sums * correction + probabilities · values of the chunk, for kRows rows.
template <typename Kv, int kRows>
inline void weigh_values(const AttentionUnit& unit, const Tile& tile, int row, int span,
                         const float* corrections, const uint8_t* const* blocks, int num_keys) {
  using Element = typename Kv::Element;
  const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
  Vector acc[kRows][kParts];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const float* sums = tile.sums + (row + r) * unit.head_dim + span;
    const Vector correction = Simd::set(corrections[r]);
    for (int p = 0; p < kParts; ++p) {
      acc[r][p] = Simd::mul(Simd::load(sums + p * kWidth), correction);
    }
  }
  for (int first = 0; first < num_keys; first += kBlockSize) {
    const auto* values =
        reinterpret_cast<const Element*>(blocks[first / kBlockSize] + layout.values) + span;
    const float* weights = tile.scores + row * kAttentionChunk + first;
    const int count = std::min(kBlockSize, num_keys - first);
    for (int key = 0; key < count; ++key, values += unit.head_dim, ++weights) {
      Vector value[kParts];
      for (int p = 0; p < kParts; ++p) value[p] = Kv::load(values + p * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Vector weight = Simd::set(weights[r * kAttentionChunk]);
        for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::fma(weight, value[p], acc[r][p]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    float* sums = tile.sums + (row + r) * unit.head_dim + span;
    for (int p = 0; p < kParts; ++p) Simd::store(sums + p * kWidth, acc[r][p]);
  }
}

// Scores of one row to probabilities, unseen keys to zero; returns the factor for the row's
// former sums. `low` and `high` are the chunk's columns that the row sees, high exclusive.
inline float soften_row(const Tile& tile, int row, int low, int high, int num_columns) {
  float* scores = tile.scores + row * kAttentionChunk;
  if (low >= high) {
    std::fill(scores, scores + num_columns, 0.f);
    return 1.f;
  }
  std::fill(scores, scores + low, -FLT_MAX);
  std::fill(scores + high, scores + num_columns, -FLT_MAX);
  Vector largest = Simd::set(-FLT_MAX);
  for (int i = 0; i < num_columns; i += kWidth) {
    largest = Simd::max(largest, Simd::load(scores + i));
  }
  const float former = tile.maximum[row];
  const float maximum = std::max(former, Simd::max_of(largest));
  const Vector shift = Simd::set(maximum);
  for (int i = 0; i < num_columns; i += kWidth) {
    Simd::store(scores + i, exp(Simd::sub(Simd::load(scores + i), shift)));
  }
  std::fill(scores, scores + low, 0.f);
  std::fill(scores + high, scores + num_columns, 0.f);
  Vector sum = Simd::zero();
  for (int i = 0; i < num_columns; i += kWidth) sum = Simd::add(sum, Simd::load(scores + i));
  const float factor = exp_scalar(former - maximum);
  tile.maximum[row] = maximum;
  tile.total[row] = tile.total[row] * factor + Simd::sum(sum);
  return factor;
}

// A value's scale goes into its weights, after their sum was taken.
template <typename Kv>
inline void scale_weights(const AttentionUnit& unit, const Tile& tile, int row,
                          const uint8_t* const* blocks, int num_blocks) {
  const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
  for (int b = 0; b < num_blocks; ++b) {
    const float* scales = reinterpret_cast<const float*>(blocks[b] + layout.value_scales);
    float* weights = tile.scores + row * kAttentionChunk + b * kBlockSize;
    for (int i = 0; i < kBlockSize; i += kWidth) {
      Simd::store(weights + i, Simd::mul(Simd::load(weights + i), Simd::load(scales + i)));
    }
  }
}

inline void prefetch(const uint8_t* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i);
}

// Computes the keys [chunk_begin, end) of the sequence, a chunk at most. The next chunk is
// fetched meanwhile: blocks lie anywhere and are too short for the processor to foresee.
template <typename Kv>
void attend_chunk(const AttentionUnit& unit, const Tile& tile, int chunk_begin, int end) {
  const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
  const int num_keys = std::min(kAttentionChunk, end - chunk_begin);
  const int num_blocks = (num_keys + kBlockSize - 1) / kBlockSize;
  const int32_t* table = unit.block_table + chunk_begin / kBlockSize;
  const int num_next =
      std::clamp((end - chunk_begin - 1) / kBlockSize + 1 - kChunkBlocks, 0, kChunkBlocks);
  const uint8_t* blocks[kChunkBlocks];
  const uint8_t* next[kChunkBlocks];
  for (int b = 0; b < num_next; ++b) {
    next[b] = unit.kv + table[kChunkBlocks + b] * unit.block_stride;
  }
  for (int b = 0; b < num_blocks; ++b) {
    blocks[b] = unit.kv + table[b] * unit.block_stride;
    if (b < num_next) {
      prefetch(next[b], layout.values);
      prefetch(next[b] + layout.key_scales, layout.bytes - layout.key_scales);
    }
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      score_block<Kv, kRows>(unit, tile, row, blocks[b], b * kBlockSize);
    });
  }
  float corrections[kMaxTileRows];
  for (int row = 0; row < tile.num_rows; ++row) {
    const int position = unit.first_position + row / unit.num_heads;
    const int first_seen = unit.window > 0 ? position - unit.window + 1 : 0;
    const int low = std::max(first_seen - chunk_begin, 0);
    const int high = std::min(position + 1 - chunk_begin, num_keys);
    corrections[row] =
        soften_row(tile, row, std::min(low, num_keys), std::max(high, 0), num_blocks * kBlockSize);
    if constexpr (Kv::kHasScales) scale_weights<Kv>(unit, tile, row, blocks, num_blocks);
  }
  const int64_t span_bytes = kSpan * kBlockSize * sizeof(typename Kv::Element);
  for (int span = 0; span < unit.head_dim; span += kSpan) {
    for (int b = 0; b < num_next; ++b) {
      prefetch(next[b] + layout.values + span / kSpan * span_bytes, span_bytes);
    }
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      weigh_values<Kv, kRows>(unit, tile, row, span, corrections + row, blocks, num_keys);
    });
  }
}

// A tile over a state's memory, nothing seen yet.
inline Tile empty_tile(const AttentionUnit& unit, float* scratch, float* state) {
  Tile tile = tile_over(unit, scratch, state);
  std::fill(tile.sums, tile.sums + int64_t{tile.num_rows} * unit.head_dim, 0.f);
  std::fill(tile.maximum, tile.maximum + tile.num_rows, -FLT_MAX);
  std::fill(tile.total, tile.total + tile.num_rows, 0.f);
  return tile;
}

// Adds a segment's state to that of the segments before it.
inline void merge(const AttentionUnit& unit, const Tile& segment, const Tile& merged) {
  for (int row = 0; row < merged.num_rows; ++row) {
    if (segment.total[row] == 0) continue;  // the row sees none of its keys
    const float maximum = std::max(merged.maximum[row], segment.maximum[row]);
    const float former = exp_scalar(merged.maximum[row] - maximum);
    const float added = exp_scalar(segment.maximum[row] - maximum);
    merged.maximum[row] = maximum;
    merged.total[row] = merged.total[row] * former + segment.total[row] * added;
    float* sums = merged.sums + int64_t{row} * unit.head_dim;
    const float* more = segment.sums + int64_t{row} * unit.head_dim;
    for (int d = 0; d < unit.head_dim; d += kWidth) {
      const Vector kept = Simd::mul(Simd::load(sums + d), Simd::set(former));
      Simd::store(sums + d, Simd::fma(Simd::load(more + d), Simd::set(added), kept));
    }
  }
}

inline void divide_by_totals(const AttentionUnit& unit, const Tile& tile) {
  for (int row = 0; row < tile.num_rows; ++row) {
    const int token = row / unit.num_heads, head = row % unit.num_heads;
    float* out = unit.out + token * unit.ld_out + head * unit.head_dim;
    const Vector inverse = Simd::set(1.f / tile.total[row]);
    for (int d = 0; d < unit.head_dim; d += kWidth) {
      Simd::store(out + d, Simd::mul(Simd::load(tile.sums + row * unit.head_dim + d), inverse));
    }
  }
}

template <typename Kv>
void attend_segment(const AttentionUnit& unit, int segment, float* scratch, float* state) {
  const Tile tile = empty_tile(unit, scratch, state);
  pack_queries(unit, tile);
  const int first_seen = unit.window > 0 ? std::max(unit.first_position - unit.window + 1, 0) : 0;
  const int first = std::max(first_seen, segment * kAttentionSegment);
  const int end =
      std::min(unit.first_position + unit.num_tokens, (segment + 1) * kAttentionSegment);
  for (int begin = first / kAttentionChunk * kAttentionChunk; begin < end;
       begin += kAttentionChunk) {
    attend_chunk<Kv>(unit, tile, begin, end);
  }
}

template <typename Kv>
void attend(const AttentionUnit& unit, float* scratch) {
  float* states = states_of(unit, scratch);
  const int num_rows = unit.num_tokens * unit.num_heads;
  float* state = states + attention_state_floats(num_rows, unit.head_dim);
  const Tile merged = empty_tile(unit, scratch, states);
  const SegmentRange segments =
      attention_segments(unit.first_position, unit.num_tokens, unit.window);
  for (int segment = segments.begin; segment < segments.end; ++segment) {
    attend_segment<Kv>(unit, segment, scratch, state);
    merge(unit, tile_over(unit, scratch, state), merged);
  }
  divide_by_totals(unit, merged);
}

void merge_segments(const AttentionUnit& unit, float* states, int num_segments, float* scratch) {
  const Tile merged = empty_tile(unit, scratch, states_of(unit, scratch));
  const int64_t floats = attention_state_floats(merged.num_rows, unit.head_dim);
  for (int segment = 0; segment < num_segments; ++segment) {
    merge(unit, tile_over(unit, scratch, states + segment * floats), merged);
  }
  divide_by_totals(unit, merged);
}

}  // namespace
}  // namespace fulcrum
