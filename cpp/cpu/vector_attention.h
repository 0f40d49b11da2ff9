// Attention of ops.h, written once over `Simd` (vector_kernels.h) and over the products of queries,
// keys and values (attention_float.h, attention_bf16.h), which know the elements of the KV blocks.
#pragma once

#include <algorithm>
#include <cfloat>

#include "attention_tile.h"

namespace fulcrum {
namespace {

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

// The first `num_columns` scores of a row to probabilities, those outside of [low, high) to zero;
// adds them to the row's total and returns the factor for its former sums. The total is that of the
// probabilities as they will be multiplied, so that their rounding is divided out again.
template <typename Products>
inline float soften(const Tile& tile, int row, int low, int high, int num_columns) {
  constexpr int kMostVectors = kAttentionChunk / kWidth;
  float* scores = tile.scores + row * kAttentionChunk;
  Vector values[kMostVectors];
  Vector largest = Simd::set(-FLT_MAX);
#pragma GCC unroll 16
  for (int i = 0; i < num_columns / kWidth; ++i) {
    values[i] = Simd::load(scores + i * kWidth);
    largest = Simd::max(largest, values[i]);
  }
  const float former = tile.maximum[row];
  const float maximum = std::max(former, Simd::max_of(largest));
  const Vector shift = Simd::set(maximum);
#pragma GCC unroll 16
  for (int i = 0; i < num_columns / kWidth; ++i) {
    values[i] = Products::as_multiplied(exp_negative(Simd::sub(values[i], shift)));
    Simd::store(scores + i * kWidth, values[i]);
  }
  if (low > 0 || high < num_columns) {
    std::fill(scores, scores + low, 0.f);
    std::fill(scores + high, scores + num_columns, 0.f);
    for (int i = 0; i < num_columns / kWidth; ++i) values[i] = Simd::load(scores + i * kWidth);
  }
  Vector sum = Simd::zero();
#pragma GCC unroll 16
  for (int i = 0; i < num_columns / kWidth; ++i) sum = Simd::add(sum, values[i]);
  const float factor = factor_of(former, maximum);
  tile.maximum[row] = maximum;
  tile.total[row] = tile.total[row] * factor + Simd::sum(sum);
  return factor;
}

// `low` and `high` are the chunk's columns that the row sees, high exclusive; see soften.
template <typename Products>
inline float soften_row(const Tile& tile, int row, int low, int high, int num_columns) {
  float* scores = tile.scores + row * kAttentionChunk;
  if (low >= high) {
    std::fill(scores, scores + num_columns, 0.f);
    return 1.f;
  }
  if (low == 0 && high == kAttentionChunk) {  // most chunks: all in registers
    return soften<Products>(tile, row, 0, kAttentionChunk, kAttentionChunk);
  }
  std::fill(scores, scores + low, -FLT_MAX);
  std::fill(scores + high, scores + num_columns, -FLT_MAX);
  return soften<Products>(tile, row, low, high, num_columns);
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
template <typename Products>
void attend_chunk(const AttentionUnit& unit, const Tile& tile, int chunk_begin, int end) {
  using Kv = typename Products::Kv;
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
  for (int b = 0; b < num_blocks; ++b) blocks[b] = unit.kv + table[b] * unit.block_stride;
  for (int b = 0; b < num_blocks; b += Products::kBlocks) {
    for (int ahead = b; ahead < std::min(b + Products::kBlocks, num_next); ++ahead) {
      prefetch(next[ahead], layout.values);
      prefetch(next[ahead] + layout.key_scales, layout.bytes - layout.key_scales);
    }
    const int count = std::min(Products::kBlocks, num_blocks - b);
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      Products::template score<kRows>(unit, tile, row, blocks + b, count, b * kBlockSize);
    });
  }
  float corrections[kMaxTileRows];
  for (int token = 0, row = 0; token < unit.num_tokens; ++token) {
    const int position = unit.first_position + token;
    const int first_seen = unit.window > 0 ? position - unit.window + 1 : 0;
    const int low = std::clamp(first_seen - chunk_begin, 0, num_keys);
    const int high = std::clamp(position + 1 - chunk_begin, 0, num_keys);
    for (int head = 0; head < unit.num_heads; ++head, ++row) {
      corrections[row] = soften_row<Products>(tile, row, low, high, num_blocks * kBlockSize);
      if constexpr (Kv::kHasScales) scale_weights<Kv>(unit, tile, row, blocks, num_blocks);
      Products::finish_weights(tile, row, num_keys);
    }
  }
  constexpr int kChannels = Products::kSpans * kSpan;
  for (int channel = 0; channel < unit.head_dim; channel += kChannels) {
    const int64_t begin = layout.values + channel * kBlockSize * sizeof(typename Kv::Element);
    const int64_t bytes =
        std::min(kChannels, unit.head_dim - channel) * kBlockSize * sizeof(typename Kv::Element);
    for (int b = 0; b < num_next; ++b) prefetch(next[b] + begin, bytes);
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      Products::template weigh<kRows>(unit, tile, row, channel, corrections + row, blocks,
                                      num_keys);
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
    const float former = factor_of(merged.maximum[row], maximum);
    const float added = factor_of(segment.maximum[row], maximum);
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

template <typename Products>
void attend_segment(const AttentionUnit& unit, int segment, float* scratch, float* state) {
  const Tile tile = empty_tile(unit, scratch, state);
  Products::pack_queries(unit, tile);
  const int first_seen = unit.window > 0 ? std::max(unit.first_position - unit.window + 1, 0) : 0;
  const int first = std::max(first_seen, segment * kAttentionSegment);
  const int end =
      std::min(unit.first_position + unit.num_tokens, (segment + 1) * kAttentionSegment);
  for (int begin = first / kAttentionChunk * kAttentionChunk; begin < end;
       begin += kAttentionChunk) {
    attend_chunk<Products>(unit, tile, begin, end);
  }
}

template <typename Products>
void attend(const AttentionUnit& unit, float* scratch) {
  float* states = states_of(unit, scratch);
  const int num_rows = unit.num_tokens * unit.num_heads;
  float* state = states + attention_state_floats(num_rows, unit.head_dim);
  const Tile merged = empty_tile(unit, scratch, states);
  const SegmentRange segments =
      attention_segments(unit.first_position, unit.num_tokens, unit.window);
  for (int segment = segments.begin; segment < segments.end; ++segment) {
    attend_segment<Products>(unit, segment, scratch, state);
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
