// Attention of ops.h, written once over `Simd` (vector_kernels.h) and over the products of queries,
// keys and values (attention_float.h, _bf16.h, _int8.h), which know the elements of the KV blocks.
#pragma once

#include <algorithm>
#include <cfloat>

#include "attention_tile.h"

namespace fulcrum {
namespace {

inline void prefetch(const uint8_t* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
}

// What a row's new reference leaves of its sums; most often all.
inline void rescale_sums(const AttentionUnit& unit, const Tile& tile, int row, float factor) {
  float* sums = tile.sums + int64_t{row} * unit.head_dim;
  for (int d = 0; d < unit.head_dim; d += kWidth) {
    Simd::store(sums + d, Simd::mul(Simd::load(sums + d), Simd::set(factor)));
  }
}

// Computes the keys [chunk_begin, end) of the sequence, a chunk at most. The next chunk is
// fetched meanwhile, that of the next segment too, which most often follows on the same thread:
// blocks lie anywhere and are too short for the processor to foresee.
template <typename Products>
void attend_chunk(const AttentionUnit& unit, const Tile& tile, int chunk_begin, int end) {
  const KvBlockLayout layout(Products::Kv::kDtype, unit.head_dim);
  const int last = unit.first_position + unit.num_tokens;  // of all segments
  const int num_keys = std::min(kAttentionChunk, end - chunk_begin);
  const int num_blocks = (num_keys + kBlockSize - 1) / kBlockSize;
  const int32_t* table = unit.block_table + chunk_begin / kBlockSize;
  const int num_next =
      std::clamp((last - chunk_begin - 1) / kBlockSize + 1 - kChunkBlocks, 0, kChunkBlocks);
  const uint8_t* blocks[kChunkBlocks];
  for (int b = 0; b < num_blocks; ++b) blocks[b] = unit.block(table[b]);
  // In the order of memory, an equal part at each step of what follows.
  constexpr int kChannels = Products::kSpans * kSpan;
  const int num_steps =
      kChunkBlocks / Products::kBlocks + (unit.head_dim + kChannels - 1) / kChannels;
  int step = 0, fetched = 0;
  const auto fetch_ahead = [&] {
    ++step;
    for (; fetched < step * num_next / num_steps; ++fetched) {
      prefetch(unit.block(table[kChunkBlocks + fetched]), layout.bytes);
    }
  };
  for (int b = 0; b < num_blocks; b += Products::kBlocks) {
    fetch_ahead();
    const int count = std::min(Products::kBlocks, num_blocks - b);
    if constexpr (Products::kRowGroup == kWholeTile) {
      Products::score(unit, tile, blocks + b, count, b * kBlockSize);
    } else {
      for_row_groups<Products::kRowGroup>(tile.num_rows, [&]<int kRows>(int row) {
        Products::template score<kRows>(unit, tile, row, blocks + b, count, b * kBlockSize);
      });
    }
  }
  for (int token = 0, row = 0; token < unit.num_tokens; ++token) {
    const int position = unit.first_position + token;
    const int first_seen = unit.window > 0 ? position - unit.window + 1 : 0;
    const int low = std::clamp(first_seen - chunk_begin, 0, num_keys);
    const int high = std::clamp(position + 1 - chunk_begin, 0, num_keys);
    for (int head = 0; head < unit.num_heads; ++head, ++row) {
      if (low >= high) {
        float* weights = tile.scores + row * kAttentionChunk;
        std::fill(weights, weights + kAttentionChunk, 0.f);
        continue;
      }
      const float factor =
          Products::soften(unit, tile, row, {low, high, num_blocks * kBlockSize}, blocks);
      if (factor != 1) rescale_sums(unit, tile, row, factor);
    }
  }
  for (int channel = 0; channel < unit.head_dim; channel += kChannels) {
    fetch_ahead();
    if constexpr (Products::kRowGroup == kWholeTile) {
      Products::weigh(unit, tile, channel, blocks, num_keys);
    } else {
      for_row_groups<Products::kRowGroup>(tile.num_rows, [&]<int kRows>(int row) {
        Products::template weigh<kRows>(unit, tile, row, channel, blocks, num_keys);
      });
    }
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

// The queries are packed.
template <typename Products>
void compute_segment(const AttentionUnit& unit, int segment, float* scratch, float* state) {
  const Tile tile = empty_tile(unit, scratch, state);
  const typename Products::Scope scope(tile);
  std::fill(tile.totals, tile.totals + tile.num_rows * kWidth, 0.f);
  const int first_seen = unit.window > 0 ? std::max(unit.first_position - unit.window + 1, 0) : 0;
  const int first = std::max(first_seen, segment * kAttentionSegment);
  const int end =
      std::min(unit.first_position + unit.num_tokens, (segment + 1) * kAttentionSegment);
  for (int begin = first / kAttentionChunk * kAttentionChunk; begin < end;
       begin += kAttentionChunk) {
    attend_chunk<Products>(unit, tile, begin, end);
  }
  for (int row = 0; row < tile.num_rows; ++row) {
    tile.total[row] = Simd::sum(Simd::load(tile.totals + row * kWidth));
  }
}

template <typename Products>
void attend_segment(const AttentionUnit& unit, int segment, float* scratch, float* state) {
  Products::pack_queries(unit, tile_over(unit, scratch, state));
  compute_segment<Products>(unit, segment, scratch, state);
}

template <typename Products>
void attend(const AttentionUnit& unit, float* scratch) {
  float* states = states_of(unit, scratch);
  const Tile merged = tile_over(unit, scratch, states);
  float* state = states + attention_state_floats(merged.num_rows, unit.head_dim);
  Products::pack_queries(unit, merged);
  const SegmentRange segments =
      attention_segments(unit.first_position, unit.num_tokens, unit.window);
  compute_segment<Products>(unit, segments.begin, scratch, states);
  for (int segment = segments.begin + 1; segment < segments.end; ++segment) {
    compute_segment<Products>(unit, segment, scratch, state);
    merge(unit, tile_over(unit, scratch, state), merged);
  }
  divide_by_totals(unit, merged);
}

void merge_segments(const AttentionUnit& unit, float* states, int num_segments, float* scratch) {
  const Tile merged = tile_over(unit, scratch, states);
  const int64_t floats = attention_state_floats(merged.num_rows, unit.head_dim);
  for (int segment = 1; segment < num_segments; ++segment) {
    merge(unit, tile_over(unit, scratch, states + segment * floats), merged);
  }
  divide_by_totals(unit, merged);
}

}  // namespace
}  // namespace fulcrum
