// The products of attention in floats: queries by keys, probabilities by values. One vector of keys
// or values at a time, multiplied by a broadcast float of each row.
#pragma once

#include "attention_tile.h"

namespace fulcrum {
namespace {

// Scores of a block's keys, vector `part` of them, with the scales of those that have any.
template <typename Kv>
inline Vector scale_scores(const AttentionUnit& unit, const uint8_t* block, int part,
                           Vector scores) {
  if constexpr (!Kv::kHasScales) return scores;
  const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
  const float* scales = reinterpret_cast<const float*>(block + layout.key_scales);
  return Simd::mul(scores, Simd::load(scales + part * kWidth));
}

template <typename KvElements>
struct FloatProducts {
  using Scope = NoScope;
  using Kv = KvElements;
  using Element = typename Kv::Element;
  // Rows that share each load of K and V: their chains of additions hide the latency of one, and
  // the sums of all fit the registers.
  static constexpr int kRowGroup = kWidth == 16 ? 12 : 4;
  static constexpr int kBlocks = 1;  // that `score` takes at a time
  static constexpr int kSpans = 1;   // of channels that `weigh` takes at a time

  // Lays the queries out so that a group's rows are read side by side.
  static void pack_queries(const AttentionUnit& unit, const Tile& tile) {
    for_row_groups<kRowGroup>(tile.num_rows, [&]<int kRows>(int row) {
      float* packed = tile.queries + int64_t{row} * unit.head_dim;
      for (int r = 0; r < kRows; ++r) {
        const float* query = query_row(unit, row + r);
        for (int d = 0; d < unit.head_dim; ++d) packed[d * kRows + r] = query[d];
      }
    });
  }

  // scores[row, column + 0:16] = query[row] · keys of the block, for kRows rows.
  template <int kRows>
  static void score(const AttentionUnit& unit, const Tile& tile, int row,
                    const uint8_t* const* blocks, int /*num_blocks*/, int column) {
    const auto* keys = reinterpret_cast<const Element*>(blocks[0]);
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
        Simd::store(out + p * kWidth, scale_scores<Kv>(unit, blocks[0], p, acc[r][p]));
      }
    }
  }

  // A row's scores to probabilities, zero where it does not see, times the scales of values that
  // have any; returns the factor for its former sums.
  static float soften(const AttentionUnit& unit, const Tile& tile, int row, const SeenColumns& seen,
                      const uint8_t* const* blocks) {
    const float factor = soften_scores(tile, row, seen);
    if constexpr (Kv::kHasScales) scale_weights(unit, tile, row, seen, blocks);
    return factor;
  }

  // sums[row, span] += probabilities · values of the chunk, for kRows rows.
  template <int kRows>
  static void weigh(const AttentionUnit& unit, const Tile& tile, int row, int span,
                    const uint8_t* const* blocks, int num_keys) {
    const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
    Vector acc[kRows][kParts];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const float* sums = tile.sums + (row + r) * unit.head_dim + span;
      for (int p = 0; p < kParts; ++p) acc[r][p] = Simd::load(sums + p * kWidth);
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

 private:
  static float soften_scores(const Tile& tile, int row, const SeenColumns& seen) {
    if (seen.low == 0 && seen.high == kAttentionChunk) {  // most chunks: all in registers
      return soften_columns(tile, row, {0, kAttentionChunk, kAttentionChunk});
    }
    float* scores = tile.scores + row * kAttentionChunk;
    std::fill(scores, scores + seen.low, -FLT_MAX);
    std::fill(scores + seen.high, scores + seen.num_columns, -FLT_MAX);
    return soften_columns(tile, row, seen);
  }

  static inline float soften_columns(const Tile& tile, int row, const SeenColumns& seen) {
    constexpr int kMostVectors = kAttentionChunk / kWidth;
    float* scores = tile.scores + row * kAttentionChunk;
    Vector values[kMostVectors];
    Vector largest = Simd::set(-FLT_MAX);
#pragma GCC unroll 16
    for (int i = 0; i < seen.num_columns / kWidth; ++i) {
      values[i] = Simd::load(scores + i * kWidth);
      largest = Simd::max(largest, values[i]);
    }
    const float former = tile.maximum[row];
    const float maximum = std::max(former, Simd::max_of(largest));
    const Vector shift = Simd::set(maximum);
#pragma GCC unroll 16
    for (int i = 0; i < seen.num_columns / kWidth; ++i) {
      values[i] = exp_negative(Simd::sub(values[i], shift));
      Simd::store(scores + i * kWidth, values[i]);
    }
    if (seen.low > 0 || seen.high < seen.num_columns) {
      std::fill(scores, scores + seen.low, 0.f);
      std::fill(scores + seen.high, scores + seen.num_columns, 0.f);
      for (int i = 0; i < seen.num_columns / kWidth; ++i) {
        values[i] = Simd::load(scores + i * kWidth);
      }
    }
    Vector sum = Simd::zero();
#pragma GCC unroll 16
    for (int i = 0; i < seen.num_columns / kWidth; ++i) sum = Simd::add(sum, values[i]);
    const float factor = factor_of(former, maximum);
    float* totals = tile.totals + row * kWidth;
    tile.maximum[row] = maximum;
    Simd::store(totals, Simd::add(Simd::mul(Simd::load(totals), Simd::set(factor)), sum));
    return factor;
  }

  static void scale_weights(const AttentionUnit& unit, const Tile& tile, int row,
                            const SeenColumns& seen, const uint8_t* const* blocks) {
    const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
    for (int b = 0; b < seen.num_columns / kBlockSize; ++b) {
      const float* scales = reinterpret_cast<const float*>(blocks[b] + layout.value_scales);
      float* weights = tile.scores + row * kAttentionChunk + b * kBlockSize;
      for (int i = 0; i < kBlockSize; i += kWidth) {
        Simd::store(weights + i, Simd::mul(Simd::load(weights + i), Simd::load(scales + i)));
      }
    }
  }
};

}  // namespace
}  // namespace fulcrum
