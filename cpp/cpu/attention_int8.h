// The products of attention over an int8 cache in integers, by vpdpbusd: four to each lane, and no
// element of the cache is converted. Queries, and probabilities times the scales of their values,
// are integers of 16 bits relative to the largest of their row (of its chunk), multiplied as two
// bytes: far below what an int8 cache itself rounds off. Sums are exact, in any order. Included
// only by files compiled for AVX-512 with VNNI.
#pragma once

#include <cstring>

#include "attention_avx512.h"

namespace fulcrum {
namespace {

constexpr int kQuad = 4;             // elements that a lane multiplies at once
constexpr float kMostQuery = 32512;  // 127 * 256, so that the upper byte is at most 127
constexpr float kMostWeight = 65535;

// The elements of a block by fours: keys (head_dim / 4, kBlockSize, 4 channels), with an offset of
// 128 since vpdpbusd wants one side unsigned; values (kBlockSize / 4, head_dim, 4 keys).
struct QuadInt8Kv : Int8Kv {
  static void write(const float* key, const float* value, int head_dim, int offset, Element* keys,
                    Element* values, float* key_scales, float* value_scales) {
    Element* of_quad = values + offset / kQuad * kQuad * head_dim + offset % kQuad;
    const float key_inverse = scale_of(key, head_dim, key_scales + offset);
    const float value_inverse = scale_of(value, head_dim, value_scales + offset);
    for (int d = 0; d < head_dim; d += kWidth) {
      alignas(16) Element quants[kWidth];
      quantize(key + d, key_inverse, quants);
      for (int i = 0; i < kWidth; ++i) quants[i] = static_cast<Element>(quants[i] ^ -128);
      for (int i = 0; i < kWidth; i += kQuad) {
        std::memcpy(keys + (d + i) * kSpan + kQuad * offset, quants + i, kQuad);
      }
      quantize(value + d, value_inverse, quants);
      for (int i = 0; i < kWidth; ++i) of_quad[(d + i) * kQuad] = quants[i];
    }
  }
};

inline __m512i broadcast_quad(const int32_t* quad) { return _mm512_set1_epi32(*quad); }

struct Int8Products {
  using Scope = NoScope;
  using Kv = QuadInt8Kv;
  using Element = Kv::Element;
  static constexpr int kRowGroup = 8;  // two sums of each: more would not fit the registers
  static constexpr int kBlocks = 4;
  static constexpr int kSpans = 4;

  // By groups of rows: for every four channels the rows' upper bytes, then their lower ones. Then
  // a row's scale, and what its sums of products begin with, which takes the keys' offset away.
  static void pack_queries(const AttentionUnit& unit, const Tile& tile) {
    for_row_groups<kRowGroup>(tile.num_rows, [&]<int kRows>(int row) {
      int32_t* quads = packed_queries(unit, tile, row);
      float* scales = query_scales<kRows>(unit, tile, row);
      for (int r = 0; r < kRows; ++r) {
        const float* query = query_row(unit, row + r);
        Vector largest = Simd::zero(), faults = Simd::zero();
        for (int d = 0; d < unit.head_dim; d += kWidth) {
          const Vector v = Simd::load(query + d);
          largest = Simd::max(largest, _mm512_abs_ps(v));
          faults = Simd::fma(v, Simd::zero(), faults);  // NaN where v is infinite or NaN
        }
        const float maximum = Simd::max_of(largest), fault = Simd::sum(faults);
        const bool representable = fault == 0 && maximum >= kMostQuery * FLT_MIN;
        scales[r] = representable ? maximum / kMostQuery : fault;
        const Vector inverse = Simd::set(representable ? kMostQuery / maximum : 0.f);
        __m512i upper_sums = _mm512_setzero_si512(), lower_sums = _mm512_setzero_si512();
        int32_t* out = quads + r;
        for (int d = 0; d < unit.head_dim; d += kWidth) {
          const __m512i wide = _mm512_cvtps_epi32(Simd::mul(Simd::load(query + d), inverse));
          const __m512i upper =
              _mm512_srai_epi32(_mm512_add_epi32(wide, _mm512_set1_epi32(128)), 8);
          const __m512i lower = _mm512_sub_epi32(wide, _mm512_slli_epi32(upper, 8));
          upper_sums = _mm512_add_epi32(upper_sums, upper);
          lower_sums = _mm512_add_epi32(lower_sums, lower);
          alignas(16) int32_t bytes[2][kQuad];
          _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0]), _mm512_cvtepi32_epi8(upper));
          _mm_store_si128(reinterpret_cast<__m128i*>(bytes[1]), _mm512_cvtepi32_epi8(lower));
#pragma GCC unroll 4
          for (int i = 0; i < kQuad; ++i, out += 2 * kRows) {
            out[0] = bytes[0][i];
            out[kRows] = bytes[1][i];
          }
        }
        int32_t* begins = reinterpret_cast<int32_t*>(scales + kRows);
        begins[r] = -128 * _mm512_reduce_add_epi32(upper_sums);
        begins[kRows + r] = -128 * _mm512_reduce_add_epi32(lower_sums);
      }
    });
  }

  template <int kRows>
  static void score(const AttentionUnit& unit, const Tile& tile, int row,
                    const uint8_t* const* blocks, int num_blocks, int column) {
    constexpr int kAtOnce = kRows <= 3 ? 4 : kRows <= 6 ? 2 : 1;
    int b = 0;
    for (; b + kAtOnce <= num_blocks; b += kAtOnce) {
      score_blocks<kRows, kAtOnce>(unit, tile, row, blocks + b, column + b * kBlockSize);
    }
    for (; b < num_blocks; ++b) {
      score_blocks<kRows, 1>(unit, tile, row, blocks + b, column + b * kBlockSize);
    }
  }

  // Probabilities times the scales of their values, as integers: the upper bytes of a chunk, then
  // the lower ones, then the scale.
  static float soften(const AttentionUnit& unit, const Tile& tile, int row, const SeenColumns& seen,
                      const uint8_t* const* blocks) {
    if (seen.low == 0 && seen.high == kAttentionChunk) {
      return soften_to_bytes<true>(unit, tile, row, seen, blocks);
    }
    return soften_to_bytes<false>(unit, tile, row, seen, blocks);
  }

  template <int kRows>
  static void weigh(const AttentionUnit& unit, const Tile& tile, int row, int span,
                    const uint8_t* const* blocks, int num_keys) {
    constexpr int kAtOnce = kRows <= 3 ? 4 : kRows <= 6 ? 2 : 1;
    const int end = std::min(span + kSpans * kSpan, unit.head_dim);
    for (; span + kAtOnce * kSpan <= end; span += kAtOnce * kSpan) {
      weigh_spans<kRows, kAtOnce>(unit, tile, row, span, blocks, num_keys);
    }
    for (; span < end; span += kSpan) {
      weigh_spans<kRows, 1>(unit, tile, row, span, blocks, num_keys);
    }
  }

 private:
  static constexpr int kQuadsOfChunk = kAttentionChunk / kQuad;

  static int32_t* packed_queries(const AttentionUnit& unit, const Tile& tile, int row) {
    return reinterpret_cast<int32_t*>(tile.queries + int64_t{row} * unit.head_dim);
  }
  template <int kRows>
  static float* query_scales(const AttentionUnit& unit, const Tile& tile, int row) {
    return tile.queries + int64_t{row} * unit.head_dim + kRows * (unit.head_dim / 2);
  }

  template <bool kWhole>
  static float soften_to_bytes(const AttentionUnit& unit, const Tile& tile, int row,
                               const SeenColumns& seen, const uint8_t* const* blocks) {
    const int64_t scales_begin = KvBlockLayout(Kv::kDtype, unit.head_dim).value_scales;
    const int num_vectors = kWhole ? kAttentionChunk / kWidth : seen.num_columns / kWidth;
    float* totals = tile.totals + row * kWidth;
    Vector weights[kAttentionChunk / kWidth];
    Vector total = Simd::zero();
    __m512i largest = _mm512_setzero_si512();  // of bits: as of positive floats, NaN the largest
    const float factor =
        soften_columns<kWhole, 4>(tile, row, seen, [&](int i, Vector p, __mmask16 lanes) {
          total = Simd::add(total, p);
          const float* scales = reinterpret_cast<const float*>(blocks[i] + scales_begin);
          weights[i] = _mm512_maskz_mul_ps(lanes, p, Simd::load(scales));
          largest = _mm512_max_epu32(largest, _mm512_castps_si512(weights[i]));
        });
    Simd::store(totals, Simd::fma(Simd::load(totals), Simd::set(factor), total));
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    float maximum;
    std::memcpy(&maximum, &bits, sizeof maximum);
    const bool vanishes = maximum < kMostWeight * FLT_MIN;
    const Vector inverse = Simd::set(vanishes ? 0.f : kMostWeight / maximum);
    auto* bytes = reinterpret_cast<uint8_t*>(tile.scores + row * kAttentionChunk);
#pragma GCC unroll 8
    for (int i = 0; i < num_vectors; ++i) {
      const __m512i wide = _mm512_cvtps_epi32(Simd::mul(weights[i], inverse));
      auto* at = reinterpret_cast<__m128i*>(bytes + i * kWidth);
      _mm_storeu_si128(at, _mm512_cvtepi32_epi8(_mm512_srli_epi32(wide, 8)));
      _mm_storeu_si128(at + kAttentionChunk / kWidth, _mm512_cvtepi32_epi8(wide));
    }
    tile.scores[row * kAttentionChunk + 2 * kQuadsOfChunk] = maximum / kMostWeight;
    return factor;
  }

  template <int kRows, int kBlocksAtOnce>
  static void score_blocks(const AttentionUnit& unit, const Tile& tile, int row,
                           const uint8_t* const* blocks, int column) {
    const int64_t scales_begin = KvBlockLayout(Kv::kDtype, unit.head_dim).key_scales;
    const int32_t* queries = packed_queries(unit, tile, row);
    const float* query_scale = query_scales<kRows>(unit, tile, row);
    const auto* begins = reinterpret_cast<const int32_t*>(query_scale + kRows);
    __m512i upper[kRows][kBlocksAtOnce], lower[kRows][kBlocksAtOnce];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocksAtOnce; ++b) {
        upper[r][b] = _mm512_set1_epi32(begins[r]);
        lower[r][b] = _mm512_set1_epi32(begins[kRows + r]);
      }
    }
    for (int d = 0; d < unit.head_dim; d += kQuad, queries += 2 * kRows) {
      __m512i keys[kBlocksAtOnce];
      for (int b = 0; b < kBlocksAtOnce; ++b) keys[b] = _mm512_loadu_si512(blocks[b] + d * kSpan);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < kBlocksAtOnce; ++b) {
          upper[r][b] = _mm512_dpbusd_epi32(upper[r][b], keys[b], broadcast_quad(queries + r));
          lower[r][b] =
              _mm512_dpbusd_epi32(lower[r][b], keys[b], broadcast_quad(queries + kRows + r));
        }
      }
    }
    for (int b = 0; b < kBlocksAtOnce; ++b) {
      const Vector scales = Simd::load(reinterpret_cast<const float*>(blocks[b] + scales_begin));
      float* out = tile.scores + row * kAttentionChunk + column + b * kSpan;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector scale = Simd::mul(scales, Simd::set(query_scale[r]));
        Simd::store(out + r * kAttentionChunk,
                    Simd::mul(join_bytes(upper[r][b], lower[r][b]), scale));
      }
    }
  }

  // |sum| < 2^31: at most 512 channels of 127 * 32512, or kAttentionChunk keys of 65535 * 127.
  static Vector join_bytes(__m512i upper, __m512i lower) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower));
  }

  // Weights of keys behind the last one are zero, whatever their values.
  template <int kRows, int kSpansAtOnce>
  static void weigh_spans(const AttentionUnit& unit, const Tile& tile, int row, int span,
                          const uint8_t* const* blocks, int num_keys) {
    const int64_t values_begin = KvBlockLayout(Kv::kDtype, unit.head_dim).values;
    const float* of_row = tile.scores + row * kAttentionChunk;
    const auto* weights = reinterpret_cast<const int32_t*>(of_row);
    __m512i upper[kRows][kSpansAtOnce], lower[kRows][kSpansAtOnce];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kSpansAtOnce; ++s) {
        upper[r][s] = _mm512_setzero_si512();
        lower[r][s] = _mm512_setzero_si512();
      }
    }
    for (int first = 0; first < num_keys; first += kBlockSize) {
      const uint8_t* values = blocks[first / kBlockSize] + values_begin + kQuad * span;
      for (int quad = 0; quad < kBlockSize / kQuad; ++quad, ++weights) {
        __m512i of_quad[kSpansAtOnce];
        for (int s = 0; s < kSpansAtOnce; ++s) {
          of_quad[s] = _mm512_loadu_si512(values + s * kQuad * kSpan);
        }
        values += kQuad * unit.head_dim;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int32_t* of_this = weights + r * kAttentionChunk;
          const __m512i high = broadcast_quad(of_this);
          const __m512i low = broadcast_quad(of_this + kQuadsOfChunk);
          for (int s = 0; s < kSpansAtOnce; ++s) {
            upper[r][s] = _mm512_dpbusd_epi32(upper[r][s], high, of_quad[s]);
            lower[r][s] = _mm512_dpbusd_epi32(lower[r][s], low, of_quad[s]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector scale = Simd::set(of_row[r * kAttentionChunk + 2 * kQuadsOfChunk]);
      float* sums = tile.sums + (row + r) * unit.head_dim + span;
      for (int s = 0; s < kSpansAtOnce; ++s) {
        Simd::store(sums + s * kSpan, Simd::fma(join_bytes(upper[r][s], lower[r][s]), scale,
                                                Simd::load(sums + s * kSpan)));
      }
    }
  }
};

}  // namespace
}  // namespace fulcrum
