// Linear layers of the float formats for x86-64 with AMX: a tile register holds 16 rows of 32
// activations, another one 16 output channels of as many weights. Compiled with ISA flags, so
// everything but the entry points is local to the file.
//
// The integer formats stay with vpdpbusd (linear_avx512.cpp): their scales belong to groups of 32
// k, so that all products of a tile register would have to be scaled one by one, which takes about
// as long as multiplying without AMX: measured for int4 it was 1.03 to 1.15 times as fast with 96
// and 192 rows, and slower with fewer.
#include "cpu/amx.h"
#include "cpu/bf16_pairs.h"
#include "cpu/linear_isa.h"

namespace fulcrum {
namespace {

constexpr int kStep = 32;  // k of a product
constexpr int kPairRows = 2 * kAmxRows;

// A step of a tile's weights as a register reads it: 16 pairs of k, 16 channels.
struct alignas(64) Weights {
  uint16_t pairs[kStep / 2][2 * kTileChannels];
};

// The weights from k on, where they lie or, if they have to be decoded or end before the step does,
// in `own`.
template <typename Decoder>
inline const void* weights_at(const uint8_t* tile, int K, int k, Weights* own) {
  using Row = typename Decoder::Row;
  const Row* rows = reinterpret_cast<const Row*>(tile + Decoder::kHeaderBytes) + k;
  const bool is_whole = K - k >= kStep;
  if (Decoder::kIsBf16 && is_whole) return rows;
  for (int pair = 0; pair < kStep / 2; ++pair) {
    const bool exists = k + 2 * pair < K;
    _mm512_store_si512(own->pairs[pair],
                       exists ? Decoder::load_pair(rows + 2 * pair) : _mm512_setzero_si512());
  }
  publish_to_tiles();
  return own;
}

// Tile registers: 0…3 are sums, of up to two blocks of rows and two tiles; 4 and 5 the activations
// of the blocks, of which the last one may have fewer rows; 6 and 7 the weights of the tiles.
TileShapes block_shapes(int num_rows) {
  const int first_rows = num_rows < kAmxRows ? num_rows : kAmxRows;
  const int second_rows = num_rows > kAmxRows ? num_rows - kAmxRows : kAmxRows;
  TileShapes shapes;
  for (int tile = 0; tile < 2; ++tile) {
    shapes.set(tile, first_rows, kAmxRowBytes);
    shapes.set(2 + tile, second_rows, kAmxRowBytes);
    shapes.set(6 + tile, kStep / 2, kAmxRowBytes);
  }
  shapes.set(4, first_rows, kAmxRowBytes);
  shapes.set(5, second_rows, kAmxRowBytes);
  return shapes;
}

// Sums of one or two blocks of rows and one or two tiles: (blocks, tiles, 16 rows, 16 channels).
struct alignas(64) Sums {
  float values[2][2][kAmxRows][kTileChannels];
};

// In ascending k, by the same steps whatever the numbers of rows and tiles. stride: between rows.
template <typename Decoder, int kBlocks, int kTiles>
void multiply(const uint8_t* tile, int K, const uint16_t* x, int64_t stride, Sums* sums) {
  const int64_t x_bytes = stride * sizeof(uint16_t), tile_bytes = pair_tile_bytes<Decoder>(K);
  Weights own[kTiles];
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kBlocks > 1) _tile_zero(2);
  if constexpr (kBlocks > 1 && kTiles > 1) _tile_zero(3);
  for (int k = 0; k < K; k += kStep) {
    _tile_loadd(4, x + k, x_bytes);
    _tile_loadd(6, weights_at<Decoder>(tile, K, k, &own[0]), kAmxRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTiles > 1) {
      _tile_loadd(7, weights_at<Decoder>(tile + tile_bytes, K, k, &own[kTiles - 1]), kAmxRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBlocks > 1) {
      _tile_loadd(5, x + kAmxRows * stride + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kBlocks > 1 && kTiles > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums->values[0][0], kAmxRowBytes);
  if constexpr (kTiles > 1) _tile_stored(1, sums->values[0][1], kAmxRowBytes);
  if constexpr (kBlocks > 1) _tile_stored(2, sums->values[1][0], kAmxRowBytes);
  if constexpr (kBlocks > 1 && kTiles > 1) _tile_stored(3, sums->values[1][1], kAmxRowBytes);
}

template <typename Decoder>
struct PairProducts {
  const PackedMatrix& w;
  const uint16_t* x;  // rounded
  float* y;
  int64_t ld_y;
  bool accumulate;

  template <int kBlocks, int kTiles>
  void run(int t, int num_rows, int tile) const {
    const int64_t tile_bytes = pair_tile_bytes<Decoder>(w.K);
    const uint8_t* data = w.data + tile * tile_bytes;
    const int64_t stride = padded_k(w.K);
    Sums sums;
    multiply<Decoder, kBlocks, kTiles>(data, w.K, x + t * stride, stride, &sums);
    for (int r = 0; r < num_rows; ++r) {
      float* row = y + (t + r) * ld_y;
      for (int i = 0; i < kTiles; ++i) {
        const int channel = (tile + i) * kTileChannels;
        const __m512 values = _mm512_load_ps(sums.values[r / kAmxRows][i][r % kAmxRows]);
        store_row(row + channel, w.N - channel, accumulate,
                  Decoder::scale(data + i * tile_bytes, values));
      }
    }
  }

  // Rows [t, t_end) of all tiles, by num_rows. Few tiles at a time: their weights stay in the cache
  // while all rows pass by.
  template <int kBlocks>
  void run_rows(int t, int t_end, int num_rows, int tile_begin, int tile_end) const {
    const TileScope scope(block_shapes(num_rows));
    for (int tile = tile_begin; tile < tile_end; tile += 2) {
      for (int row = t; row < t_end; row += num_rows) {
        if (tile + 1 < tile_end) {
          run<kBlocks, 2>(row, num_rows, tile);
        } else {
          run<kBlocks, 1>(row, num_rows, tile);
        }
      }
    }
  }

  void gemm(int T, int tile_begin, int tile_end) const {
    const int whole = T / kPairRows * kPairRows, left = T - whole;
    if (whole > 0) run_rows<2>(0, whole, kPairRows, tile_begin, tile_end);
    if (left > kAmxRows) {
      run_rows<2>(whole, T, left, tile_begin, tile_end);
    } else if (left > 0) {
      run_rows<1>(whole, T, left, tile_begin, tile_end);
    }
  }
};

template <typename Decoder>
void gemm_pairs(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                int tile_begin, int tile_end, bool accumulate) {
  PairProducts<Decoder>{w, x.rounded, y, ld_y, accumulate}.gemm(T, tile_begin, tile_end);
}

}  // namespace

void quantize_rows_amx(const Activations& x, int K, int row_begin, int row_end) {
  quantize_rows_avx512(x, K, row_begin, row_end);
  if (x.rounded == nullptr) return;
  const int64_t stride = padded_k(K);
  for (int t = row_begin; t < row_end; ++t) {
    const float* values = x.values + t * x.ld_values;
    for (int k = 0; k < K; k += kStep) {
      _mm512_storeu_si512(x.rounded + t * stride + k, round_first(values + k, K - k));
    }
  }
}

void gemm_amx(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
              int tile_begin, int tile_end, bool accumulate) {
  switch (w.format) {
    case Format::kBf16:
      return gemm_pairs<Bf16Decoder>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    case Format::kFp8:
      return gemm_pairs<Fp8Decoder>(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
    default:
      return gemm_avx512(w, x, T, y, ld_y, tile_begin, tile_end, accumulate);
  }
}

}  // namespace fulcrum
