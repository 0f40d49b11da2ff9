// The products of attention in floats: queries by keys, probabilities by values. One vector of keys
// or values at a time, multiplied by a broadcast float of each row.
#pragma once

#include "attention_tile.h"

namespace fulcrum {
namespace {

template <typename KvElements>
struct FloatProducts {
  using Kv = KvElements;
  using Element = typename Kv::Element;
  static constexpr int kBlocks = 1;  // that `score` takes at a time
  static constexpr int kSpans = 1;   // of channels that `weigh` takes at a time

  // Lays the queries out so that a group's rows are read side by side.
  static void pack_queries(const AttentionUnit& unit, const Tile& tile) {
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
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

  // Probabilities are multiplied as they are.
  static Vector as_multiplied(Vector probabilities) { return probabilities; }
  static void finish_weights(const Tile&, int /*row*/, int /*num_keys*/) {}

  // sums[row, span] = sums * correction + probabilities · values of the chunk, for kRows rows.
  template <int kRows>
  static void weigh(const AttentionUnit& unit, const Tile& tile, int row, int span,
                    const float* corrections, const uint8_t* const* blocks, int num_keys) {
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
};

}  // namespace
}  // namespace fulcrum
