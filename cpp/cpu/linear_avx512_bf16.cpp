// Linear layers of the float formats for x86-64 with AVX512-BF16: 16 output channels, a tile, in
// the lanes of a register. Compiled with ISA flags, so everything but the entry point is local to
// the file.
//
// vdpbf16ps adds two products of bf16 values to each float, where a multiplication of floats adds
// one. Activations are rounded to bf16 here, some k at a time: that takes one instruction for 32
// of them, a sixteenth of those that multiply them by a tile, and no form of theirs in memory. It
// costs no quality: perplexity of SmolLM2-135M is 20.089 with and without it.
#include <cstring>

#include "cpu/bf16_pairs.h"
#include "cpu/linear_isa.h"
#include "cpu/linear_tiles.h"

namespace fulcrum {
namespace {

constexpr int kChunk = 256;  // k whose rounded activations are at hand; a multiple of 32

// The casts keep the bits: what the type of 32 bf16 values is made of depends on the compiler.
__m512 add_products(__m512 sums, __m512i weights, __m512i activations) {
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)activations);
}

// The rounded activations of some rows, and the k after an odd last one as zero.
template <int Rows>
struct RoundedChunk {
  alignas(64) uint16_t values[Rows][kChunk];

  void fill(const float* rows, int64_t stride, int num_k) {
    for (int r = 0; r < Rows; ++r) {
      for (int k = 0; k < num_k; k += 32) {
        _mm512_store_si512(values[r] + k, round_first(rows + r * stride + k, num_k - k));
      }
    }
  }
  __m512i broadcast_pair(int r, int k) const {
    int32_t pair;
    std::memcpy(&pair, values[r] + k, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
};

// One chain of pairs of products per output, in ascending k.
template <typename Decoder>
struct PairKernel {
  using Row = typename Decoder::Row;
  // Two tiles share a broadcast of activations, and their chains of additions hide the latency.
  static constexpr int kFewRows = 8, kBlockRows = 12, kBlockTiles = 2;
  static constexpr int few_tiles(int) { return 1; }
  static int64_t tile_bytes(int K) { return pair_tile_bytes<Decoder>(K); }
  static int64_t row_bytes(int K) { return int64_t{K} * 4; }

  // The pair of rows k and k + 1 of every tile times that of every row of activations.
  template <int Rows, int Tiles, bool kStreams>
  static void add_pair(const uint8_t* data, int K, int k, const RoundedChunk<Rows>& chunk,
                       __m512 (&acc)[Tiles][Rows]) {
    __m512i weights[Tiles];
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
      const Row* rows =
          reinterpret_cast<const Row*>(data + i * tile_bytes(K) + Decoder::kHeaderBytes) + k;
      const char* ahead = reinterpret_cast<const char*>(rows);
      prefetch<2 * sizeof(Row)>(ahead + (kStreams ? kStreamDistanceBytes : Tiles * tile_bytes(K)));
      weights[i] = Decoder::load_pair(rows);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512i activations = chunk.broadcast_pair(r, k % kChunk);
#pragma GCC unroll 4
      for (int i = 0; i < Tiles; ++i) {
        acc[i][r] = add_products(acc[i][r], weights[i], activations);
      }
    }
  }

  template <int Rows, int Tiles, bool kStreams>
  static void run(const uint8_t* data, int K, const Activations& x, int t, const TileOutput& out) {
    __m512 acc[Tiles][Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) acc[i][r] = _mm512_setzero_ps();
    }
    RoundedChunk<Rows> chunk;
    for (int begin = 0; begin < K; begin += kChunk) {
      const int end = K - begin < kChunk ? K : begin + kChunk;
      chunk.fill(x.values + t * x.ld_values + begin, x.ld_values, end - begin);
      for (int k = begin; k < end; k += 2) {
        add_pair<Rows, Tiles, kStreams>(data, K, k, chunk, acc);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        store_row(out.y + r * out.ld_y + i * kTileChannels, out.channels - i * kTileChannels,
                  out.accumulate, Decoder::scale(data + i * tile_bytes(K), acc[i][r]));
      }
    }
  }
};

}  // namespace

void gemm_avx512_bf16(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                      int tile_begin, int tile_end, bool accumulate) {
  switch (w.format) {
    case Format::kBf16:
      return gemm_tiles<PairKernel<Bf16Decoder>>(w, x, T, y, ld_y, tile_begin, tile_end,
                                                 accumulate);
    case Format::kFp8:
      return gemm_tiles<PairKernel<Fp8Decoder>>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    default:
      return gemm_avx512(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
}

}  // namespace fulcrum
