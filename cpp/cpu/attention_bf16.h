// The products of attention in pairs of bf16, two to each lane of vdpbf16ps: twice the rate of
// floats. Queries and probabilities are rounded to bf16; keys and values of the cache are exact in
// it. Included only by files compiled for AVX512-BF16.
#pragma once

#include <cstring>

#include "attention_tile.h"

namespace fulcrum {
namespace {

// Pairs of a cache's elements: lane i holds element i of one row and of the next.
template <typename Kv>
struct Pairs;

template <>
struct Pairs<Bf16Kv> {
  // Rows of 16 elements that follow each other.
  static __m512i load_adjacent(const uint16_t* rows) {
    return _mm512_permutexvar_epi16(adjacent_order(), _mm512_loadu_si512(rows));
  }
  // The first kVectors * 16 elements of two rows.
  template <int kVectors>
  static void load(const uint16_t* first, const uint16_t* second, __m512i* pairs) {
    if constexpr (kVectors == 2) {
      const __m512i low = _mm512_loadu_si512(first), high = _mm512_loadu_si512(second);
      const __m512i order = apart_order();
      pairs[0] = _mm512_permutex2var_epi16(low, order, high);
      pairs[1] =
          _mm512_permutex2var_epi16(low, _mm512_add_epi16(order, _mm512_set1_epi16(16)), high);
    } else {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
      pairs[0] = _mm512_permutexvar_epi16(adjacent_order(),
                                          _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
  }

 private:
  // Elements 0, 16, 1, 17, … of a register.
  static __m512i adjacent_order() {
    return _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(16 << 16));
  }
  // Elements 0, 0, 1, 1, … of two registers in turn.
  static __m512i apart_order() {
    return _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(32 << 16));
  }
  // i in both halves of lane i.
  static __m512i lane_numbers() {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16));
  }
};

template <>
struct Pairs<Int8Kv> {
  static __m512i load_adjacent(const int8_t* rows) { return pair(rows, rows + 16); }
  template <int kVectors>
  static void load(const int8_t* first, const int8_t* second, __m512i* pairs) {
    for (int i = 0; i < kVectors; ++i) pairs[i] = pair(first + 16 * i, second + 16 * i);
  }

 private:
  // An integer of 8 bits as a float has nothing in the lower half of its bits: the upper one is it
  // as bf16.
  static __m512i pair(const int8_t* first, const int8_t* second) {
    const __m512i low = _mm512_castps_si512(Simd::load_int8(first));
    const __m512i high = _mm512_castps_si512(Simd::load_int8(second));
    return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
  }
};

// The pair that a row contributes to all lanes.
inline __m512i broadcast_pair(const float* pairs) {
  int32_t pair;
  std::memcpy(&pair, pairs, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

// 32 floats rounded to bf16, in order.
inline __m512i round_to_bf16(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

inline __m512 add_pair_products(__m512 sums, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

template <typename KvElements>
struct Bf16Products {
  using Kv = KvElements;
  using Element = typename Kv::Element;
  // A broadcast pair of a row meets two vectors of keys or values: loading it costs as much as
  // multiplying by it.
  static constexpr int kBlocks = 2;
  static constexpr int kSpans = 2;

  // As pairs of channels, so that those of a group's rows are read side by side. Half of the
  // queries' memory is left unused.
  static void pack_queries(const AttentionUnit& unit, const Tile& tile) {
    for_row_groups(tile.num_rows, [&]<int kRows>(int row) {
      float* packed = tile.queries + int64_t{row} * unit.head_dim;
      for (int r = 0; r < kRows; ++r) {
        const float* query = query_row(unit, row + r);
        for (int d = 0; d < unit.head_dim; d += 16) {
          alignas(64) float pairs[16];  // eight of them pairs, then zeros
          _mm512_store_si512(pairs, round_to_bf16(_mm512_loadu_ps(query + d), Simd::zero()));
          for (int i = 0; i < 8; ++i) packed[(d / 2 + i) * kRows + r] = pairs[i];
        }
      }
    });
  }

  template <int kRows>
  static void score(const AttentionUnit& unit, const Tile& tile, int row,
                    const uint8_t* const* blocks, int num_blocks, int column) {
    if (num_blocks == 2) {
      score_blocks<kRows, 2>(unit, tile, row, blocks, column);
    } else {
      score_blocks<kRows, 1>(unit, tile, row, blocks, column);
    }
  }

  // Rounded to bf16, unless scales are still to be multiplied in.
  static Vector as_multiplied(Vector probabilities) {
    if constexpr (Kv::kHasScales) return probabilities;
    const __m512i bits = _mm512_castps_si512(probabilities);
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(1 << 15));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(-1 << 16)));
  }

  // A row's probabilities to pairs of keys, in the first half of their memory.
  static void finish_weights(const Tile& tile, int row, int num_keys) {
    float* weights = tile.scores + row * kAttentionChunk;
    if (num_keys % 2 == 1) weights[num_keys] = 0;  // whatever the scale of an unwritten value is
    for (int i = 0; i < num_keys; i += 32) {
      const __m512 second = i + 16 < num_keys ? _mm512_loadu_ps(weights + i + 16) : Simd::zero();
      _mm512_storeu_si512(weights + i / 2, round_to_bf16(_mm512_loadu_ps(weights + i), second));
    }
  }

  template <int kRows>
  static void weigh(const AttentionUnit& unit, const Tile& tile, int row, int span,
                    const float* corrections, const uint8_t* const* blocks, int num_keys) {
    if (span + 2 * kSpan <= unit.head_dim) {
      weigh_spans<kRows, 2>(unit, tile, row, span, corrections, blocks, num_keys);
    } else {
      weigh_spans<kRows, 1>(unit, tile, row, span, corrections, blocks, num_keys);
    }
  }

 private:
  template <int kRows, int kBlocksAtOnce>
  static void score_blocks(const AttentionUnit& unit, const Tile& tile, int row,
                           const uint8_t* const* blocks, int column) {
    const float* queries = tile.queries + int64_t{row} * unit.head_dim;
    const Element* keys[kBlocksAtOnce];
    for (int b = 0; b < kBlocksAtOnce; ++b) keys[b] = reinterpret_cast<const Element*>(blocks[b]);
    __m512 acc[kRows][kBlocksAtOnce];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocksAtOnce; ++b) acc[r][b] = Simd::zero();
    }
    for (int d = 0; d < unit.head_dim; d += 2, queries += kRows) {
      __m512i pairs[kBlocksAtOnce];
      for (int b = 0; b < kBlocksAtOnce; ++b) {
        pairs[b] = Pairs<Kv>::load_adjacent(keys[b] + d * kSpan);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i query = broadcast_pair(queries + r);
        for (int b = 0; b < kBlocksAtOnce; ++b) {
          acc[r][b] = add_pair_products(acc[r][b], query, pairs[b]);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* out = tile.scores + (row + r) * kAttentionChunk + column;
      for (int b = 0; b < kBlocksAtOnce; ++b) {
        _mm512_storeu_ps(out + b * kSpan, scale_scores<Kv>(unit, blocks[b], 0, acc[r][b]));
      }
    }
  }

  template <int kRows, int kSpansAtOnce>
  static void weigh_spans(const AttentionUnit& unit, const Tile& tile, int row, int span,
                          const float* corrections, const uint8_t* const* blocks, int num_keys) {
    alignas(64) static constexpr Element kNothing[kSpansAtOnce * kSpan] = {};
    const KvBlockLayout layout(Kv::kDtype, unit.head_dim);
    __m512 acc[kRows][kSpansAtOnce];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const float* sums = tile.sums + (row + r) * unit.head_dim + span;
      const __m512 correction = Simd::set(corrections[r]);
      for (int s = 0; s < kSpansAtOnce; ++s) {
        acc[r][s] = Simd::mul(Simd::load(sums + s * kSpan), correction);
      }
    }
    for (int first = 0; first < num_keys; first += kBlockSize) {
      const auto* values =
          reinterpret_cast<const Element*>(blocks[first / kBlockSize] + layout.values) + span;
      const float* weights = tile.scores + row * kAttentionChunk + first / 2;
      const int count = std::min(kBlockSize, num_keys - first);
      for (int key = 0; key < count; key += 2, values += 2 * unit.head_dim, ++weights) {
        // What lies behind the last key was never written.
        const Element* second = key + 1 < count ? values + unit.head_dim : kNothing;
        __m512i pairs[kSpansAtOnce];
        Pairs<Kv>::template load<kSpansAtOnce>(values, second, pairs);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const __m512i weight = broadcast_pair(weights + r * kAttentionChunk);
          for (int s = 0; s < kSpansAtOnce; ++s) {
            acc[r][s] = add_pair_products(acc[r][s], weight, pairs[s]);
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* sums = tile.sums + (row + r) * unit.head_dim + span;
      for (int s = 0; s < kSpansAtOnce; ++s) Simd::store(sums + s * kSpan, acc[r][s]);
    }
  }
};

}  // namespace
}  // namespace fulcrum
