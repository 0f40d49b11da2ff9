// The products of attention by AMX: 16 rows of queries or of probabilities meet a KV block at once.
// They are rounded to bf16; keys and values of the cache are exact in it, and their pairs lie as
// tile registers want them. Included only by files compiled for AMX.
//
// What a row gets does not depend on the rows beside it, and it adds up channels and keys by the
// same steps in every tile.
#pragma once

#include "amx.h"
#include "attention_bf16.h"

namespace fulcrum {
namespace {

// Tile registers: 0…3 are sums; 4 and 5 rows of 32 and of 16 elements; 6 and 7 what they meet.
struct AmxProducts {
  using Kv = PairedBf16Kv;
  using Element = Kv::Element;
  static constexpr int kRowGroup = kWholeTile;
  static constexpr int kBlocks = 2;
  static constexpr int kSpans = 4;
  static constexpr int kStep = 32;  // elements that a product takes of a row; else half of it
  static constexpr int kHalf = kStep / 2;
  static constexpr int kBlockPairs = kBlockSize / 2;

  class Scope {
   public:
    explicit Scope(const Tile& tile) : scope_(shapes(std::min(tile.num_rows, kAmxRows))) {}

   private:
    static TileShapes shapes(int rows) {
      TileShapes shapes;
      for (int sums = 0; sums < kSpans; ++sums) shapes.set(sums, rows, kAmxRowBytes);
      shapes.set(4, rows, kStep * sizeof(Element));
      shapes.set(5, rows, kHalf * sizeof(Element));
      shapes.set(6, kStep / 2, kAmxRowBytes);
      shapes.set(7, kHalf / 2, kAmxRowBytes);
      return shapes;
    }

    TileScope scope_;
  };

  // Row by row, in half of the queries' memory.
  static void pack_queries(const AttentionUnit& unit, const Tile& tile) {
    auto* packed = reinterpret_cast<Element*>(tile.queries);
    for (int row = 0; row < tile.num_rows; ++row, packed += unit.head_dim) {
      const float* query = query_row(unit, row);
      int d = 0;
      for (; d + kStep <= unit.head_dim; d += kStep) {
        _mm512_storeu_si512(packed + d,
                            round_to_bf16(Simd::load(query + d), Simd::load(query + d + kHalf)));
      }
      if (d < unit.head_dim) {
        const __m512i rounded = round_to_bf16(Simd::load(query + d), Simd::zero());
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + d),
                            _mm512_castsi512_si256(rounded));
      }
    }
  }

  // Rows behind the last one are computed up to a whole group: there is memory for them, and
  // nothing reads what becomes of it.
  static void score(const AttentionUnit& unit, const Tile& tile, const uint8_t* const* blocks,
                    int num_blocks, int column) {
    const auto* queries = reinterpret_cast<const Element*>(tile.queries);
    const int64_t stride = unit.head_dim * int64_t{sizeof(Element)};
    const auto* keys = reinterpret_cast<const Element*>(blocks[0]);
    const auto* more = reinterpret_cast<const Element*>(blocks[num_blocks - 1]);
    publish_to_tiles();
    for (int row = 0; row < tile.num_rows; row += kAmxRows) {
      const Element* of_rows = queries + int64_t{row} * unit.head_dim;
      _tile_zero(0);
      _tile_zero(1);
      int d = 0;
      for (; d + kStep <= unit.head_dim; d += kStep) {
        _tile_loadd(4, of_rows + d, stride);
        _tile_loadd(6, keys + d * kSpan, kAmxRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if (num_blocks > 1) {
          _tile_loadd(6, more + d * kSpan, kAmxRowBytes);
          _tile_dpbf16ps(1, 4, 6);
        }
      }
      if (d < unit.head_dim) {
        _tile_loadd(5, of_rows + d, stride);
        _tile_loadd(7, keys + d * kSpan, kAmxRowBytes);
        _tile_dpbf16ps(0, 5, 7);
        if (num_blocks > 1) {
          _tile_loadd(7, more + d * kSpan, kAmxRowBytes);
          _tile_dpbf16ps(1, 5, 7);
        }
      }
      float* out = tile.scores + row * kAttentionChunk + column;
      _tile_stored(0, out, kScoreStride);
      if (num_blocks > 1) _tile_stored(1, out + kSpan, kScoreStride);
    }
  }

  static float soften(const AttentionUnit& unit, const Tile& tile, int row, const SeenColumns& seen,
                      const uint8_t* const* blocks) {
    return Bf16Products::soften(unit, tile, row, seen, blocks);
  }

  static void weigh(const AttentionUnit& unit, const Tile& tile, int channel,
                    const uint8_t* const* blocks, int num_keys) {
    const int num_spans = std::min(kSpans, (unit.head_dim - channel) / kSpan);
    const int num_blocks = (num_keys + kBlockSize - 1) / kBlockSize;
    const Values last(unit, channel, num_spans, blocks[num_blocks - 1],
                      num_keys - (num_blocks - 1) * kBlockSize);
    for (int row = 0; row < tile.num_rows; row += kAmxRows) {
      float* sums = tile.sums + int64_t{row} * unit.head_dim + channel;
      const int rows_left = tile.num_rows - row;
      if (rows_left >= kAmxRows || row == 0) {
        weigh_rows(unit, tile, row, channel, blocks, num_blocks, last, num_spans, sums,
                   unit.head_dim);
        continue;
      }
      // The registers have rows that the sums have not.
      alignas(64) float own[kAmxRows][kSpans * kSpan] = {};
      for (int r = 0; r < rows_left; ++r) copy_floats(sums + r * unit.head_dim, num_spans, own[r]);
      weigh_rows(unit, tile, row, channel, blocks, num_blocks, last, num_spans, own[0],
                 kSpans * kSpan);
      for (int r = 0; r < rows_left; ++r) copy_floats(own[r], num_spans, sums + r * unit.head_dim);
    }
  }

 private:
  static constexpr int64_t kScoreStride = kAttentionChunk * sizeof(float);

  // The values of a chunk's last block. What lies behind its last key was never written, and counts
  // as zero.
  struct Values {
    Values(const AttentionUnit& unit, int channel, int num_spans, const uint8_t* block, int count)
        : data(at(unit, channel, block)), stride(stride_of(unit)) {
      if (count == kBlockSize) return;
      for (int pair = 0; pair < kBlockPairs; ++pair) {
        for (int span = 0; span < num_spans; ++span) {
          const int keys = std::clamp(count - 2 * pair, 0, 2);
          const __m512i mask = _mm512_set1_epi32(keys == 0 ? 0 : keys == 1 ? 0xffff : -1);
          const Element* from = data + pair * stride / int64_t{sizeof(Element)} + span * 2 * kSpan;
          _mm512_store_si512(whole[pair] + span * 2 * kSpan,
                             _mm512_and_si512(_mm512_loadu_si512(from), mask));
        }
      }
      data = whole[0];
      stride = sizeof(whole[0]);
    }
    Values(const Values&) = delete;

    static const Element* at(const AttentionUnit& unit, int channel, const uint8_t* block) {
      const int64_t begin = KvBlockLayout(Kv::kDtype, unit.head_dim).values;
      return reinterpret_cast<const Element*>(block + begin) + 2 * channel;
    }
    static int64_t stride_of(const AttentionUnit& unit) {
      return 2 * unit.head_dim * int64_t{sizeof(Element)};
    }

    const Element* data;
    int64_t stride;  // bytes from a pair of keys to the next one
    alignas(64) Element whole[kBlockPairs][kSpans * kSpan * 2];
  };

  static void copy_floats(const float* from, int num_spans, float* to) {
    for (int i = 0; i < num_spans * kSpan; i += kWidth) Simd::store(to + i, Simd::load(from + i));
  }

  // Sixteen rows, or all of fewer. sums: row stride ld.
  static void weigh_rows(const AttentionUnit& unit, const Tile& tile, int row, int channel,
                         const uint8_t* const* blocks, int num_blocks, const Values& last,
                         int num_spans, float* sums, int64_t ld) {
    const int64_t sums_stride = ld * sizeof(float);
    const float* weights = tile.scores + row * kAttentionChunk;
    publish_to_tiles();
    _tile_loadd(0, sums, sums_stride);
    if (num_spans > 1) _tile_loadd(1, sums + kSpan, sums_stride);
    if (num_spans > 2) _tile_loadd(2, sums + 2 * kSpan, sums_stride);
    if (num_spans > 3) _tile_loadd(3, sums + 3 * kSpan, sums_stride);
    for (int b = 0; b < num_blocks; ++b) {
      const bool is_last = b == num_blocks - 1;
      const Element* values = is_last ? last.data : Values::at(unit, channel, blocks[b]);
      const int64_t stride = is_last ? last.stride : Values::stride_of(unit);
      _tile_loadd(5, reinterpret_cast<const Element*>(weights) + b * kBlockSize, kScoreStride);
      _tile_loadd(7, values, stride);
      _tile_dpbf16ps(0, 5, 7);
      if (num_spans > 1) {
        _tile_loadd(7, values + 2 * kSpan, stride);
        _tile_dpbf16ps(1, 5, 7);
      }
      if (num_spans > 2) {
        _tile_loadd(7, values + 4 * kSpan, stride);
        _tile_dpbf16ps(2, 5, 7);
      }
      if (num_spans > 3) {
        _tile_loadd(7, values + 6 * kSpan, stride);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, sums_stride);
    if (num_spans > 1) _tile_stored(1, sums + kSpan, sums_stride);
    if (num_spans > 2) _tile_stored(2, sums + 2 * kSpan, sums_stride);
    if (num_spans > 3) _tile_stored(3, sums + 3 * kSpan, sums_stride);
  }
};

}  // namespace
}  // namespace fulcrum
