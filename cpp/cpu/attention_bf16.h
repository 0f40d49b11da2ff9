// The products of attention in pairs of bf16, two to each lane of vdpbf16ps: twice the rate of
// floats. Queries and probabilities are rounded to bf16; keys and values of the cache are exact in
// it. Included only by files compiled for AVX512-BF16.
#pragma once

#include <cstring>

#include "attention_avx512.h"

namespace fulcrum {
namespace {

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

// The elements of a block by pairs, which a lane multiplies at once: keys (head_dim / 2,
// kBlockSize, 2 channels), values (kBlockSize / 2, head_dim, 2 keys).
struct PairedBf16Kv : Bf16Kv {
  static void write(const float* key, const float* value, int head_dim, int offset, Element* keys,
                    Element* values, float*, float*) {
    Element* of_keys = keys + 2 * offset;
    Element* of_pair = values + offset / 2 * 2 * head_dim + offset % 2;
    for (int d = 0; d < head_dim; d += 16) {
      alignas(64) Element rounded[32];  // of the key, then of the value
      _mm512_store_si512(rounded,
                         round_to_bf16(_mm512_loadu_ps(key + d), _mm512_loadu_ps(value + d)));
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        std::memcpy(of_keys + (d + i) * kSpan, rounded + i, 2 * sizeof(Element));
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) of_pair[2 * (d + i)] = rounded[16 + i];
    }
  }
};

inline __m512 add_pair_products(__m512 sums, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

struct Bf16Products {
  using Scope = NoScope;
  using Kv = PairedBf16Kv;
  using Element = Kv::Element;
  static constexpr int kRowGroup = 12;
  // A broadcast pair of a row meets two vectors of keys or values: loading it costs as much as
  // multiplying by it.
  static constexpr int kBlocks = 2;
  static constexpr int kSpans = 2;

  // As pairs of channels, so that those of a group's rows are read side by side. Half of the
  // queries' memory is left unused.
  static void pack_queries(const AttentionUnit& unit, const Tile& tile) {
    for_row_groups<kRowGroup>(tile.num_rows, [&]<int kRows>(int row) {
      float* packed = tile.queries + int64_t{row} * unit.head_dim;
      for (int r = 0; r < kRows; ++r) {
        const float* query = query_row(unit, row + r);
        float* out = packed + r;
        for (int d = 0; d < unit.head_dim; d += 16) {
          alignas(64) float pairs[16];  // eight of them pairs, then zeros
          _mm512_store_si512(pairs, round_to_bf16(_mm512_loadu_ps(query + d), Simd::zero()));
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i, out += kRows) *out = pairs[i];
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

  // Probabilities as pairs of keys, in the first half of their memory. Their total is of the
  // rounded ones, so that the rounding is divided out again.
  static float soften(const AttentionUnit&, const Tile& tile, int row, const SeenColumns& seen,
                      const uint8_t* const*) {
    if (seen.low == 0 && seen.high == kAttentionChunk) return soften_pairs<true>(tile, row, seen);
    return soften_pairs<false>(tile, row, seen);
  }

  template <int kRows>
  static void weigh(const AttentionUnit& unit, const Tile& tile, int row, int span,
                    const uint8_t* const* blocks, int num_keys) {
    if (span + 2 * kSpan <= unit.head_dim) {
      weigh_spans<kRows, 2>(unit, tile, row, span, blocks, num_keys);
    } else {
      weigh_spans<kRows, 1>(unit, tile, row, span, blocks, num_keys);
    }
  }

 private:
  template <bool kWhole>
  static float soften_pairs(const Tile& tile, int row, const SeenColumns& seen) {
    float* weights = tile.scores + row * kAttentionChunk;
    float* totals = tile.totals + row * kWidth;
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    Vector total = Simd::zero(), first = Simd::zero();
    const auto keep_pair = [&](int i, Vector second) {
      const __m512i pairs = round_to_bf16(first, second);
      _mm512_storeu_si512(weights + i / 2 * kWidth, pairs);
      total = add_pair_products(total, pairs, ones);
    };
    const float factor =
        soften_columns<kWhole, 3>(tile, row, seen, [&](int i, Vector p, __mmask16) {
          if (i % 2 == 0) {
            first = p;
          } else {
            keep_pair(i, p);
          }
        });
    const int num_vectors = seen.num_columns / kWidth;
    if (num_vectors % 2 == 1) keep_pair(num_vectors, Simd::zero());
    Simd::store(totals, Simd::fma(Simd::load(totals), Simd::set(factor), total));
    return factor;
  }

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
      for (int b = 0; b < kBlocksAtOnce; ++b) pairs[b] = _mm512_loadu_si512(keys[b] + d * kSpan);
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
      for (int b = 0; b < kBlocksAtOnce; ++b) _mm512_storeu_ps(out + b * kSpan, acc[r][b]);
    }
  }

  template <int kRows, int kSpansAtOnce>
  static void weigh_spans(const AttentionUnit& unit, const Tile& tile, int row, int span,
                          const uint8_t* const* blocks, int num_keys) {
    const int64_t values_begin = KvBlockLayout(Kv::kDtype, unit.head_dim).values;
    __m512 acc[kRows][kSpansAtOnce];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const float* sums = tile.sums + (row + r) * unit.head_dim + span;
      for (int s = 0; s < kSpansAtOnce; ++s) acc[r][s] = Simd::load(sums + s * kSpan);
    }
    const auto add_pair = [&](const float* weights, const __m512i(&pairs)[kSpansAtOnce]) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i weight = broadcast_pair(weights + r * kAttentionChunk);
        for (int s = 0; s < kSpansAtOnce; ++s) {
          acc[r][s] = add_pair_products(acc[r][s], weight, pairs[s]);
        }
      }
    };
    const float* weights = tile.scores + row * kAttentionChunk;
    for (int first = 0; first < num_keys; first += kBlockSize) {
      const auto* values =
          reinterpret_cast<const Element*>(blocks[first / kBlockSize] + values_begin) + 2 * span;
      const int count = std::min(kBlockSize, num_keys - first);
      __m512i pairs[kSpansAtOnce];
      for (int key = 0; key + 1 < count; key += 2, values += 2 * unit.head_dim, ++weights) {
        for (int s = 0; s < kSpansAtOnce; ++s)
          pairs[s] = _mm512_loadu_si512(values + s * 2 * kSpan);
        add_pair(weights, pairs);
      }
      if (count % 2 == 1) {  // what lies behind the last key was never written
        for (int s = 0; s < kSpansAtOnce; ++s) {
          pairs[s] = _mm512_and_si512(_mm512_loadu_si512(values + s * 2 * kSpan),
                                      _mm512_set1_epi32(0xffff));
        }
        add_pair(weights, pairs);
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
