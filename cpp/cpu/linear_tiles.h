// The loops over rows and tiles that the vector instruction sets share. All are templates on a
// kernel that is local to the including file, which makes every instance local as well: nothing
// compiled with one file's ISA flags can end up in another.
//
// A kernel has: tile_bytes(K), of the weights; row_bytes(K), of the activations; kFewRows, the rows
// it computes in one reading of the weights, few_tiles(rows) tiles at once; kBlockRows and
// kBlockTiles, its register block for more rows than that; and
//   run<Rows, Tiles, kStreams>(tile, K, x, t, out): rows t… of neighbouring tiles, to out.
//   kStreams: the weights come from memory, not from the L1 cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/tile.h"
#include "linear.h"

namespace fulcrum {

// Where a register block goes: rows of y, from the first channel of its first tile on.
struct TileOutput {
  float* y;
  int64_t ld_y;
  int channels;  // from y on that exist; may end within the last tile
  bool accumulate;
};

// Asks for a part of a tile: of the next ones, where a tile is read again for more rows and the
// stream from memory pauses meanwhile; else of what lies kStreamDistanceBytes ahead, since the
// hardware follows a stream too closely (the integer kernels of AVX2 are slow enough to leave it to
// it). Behind the last tile that is of no use and does no harm.
template <size_t kBytes>
inline __attribute__((always_inline)) void prefetch(const void* element) {
#pragma GCC unroll 18
  for (size_t line = 0; line < kBytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(element) + line);
  }
}

constexpr int64_t kStreamDistanceBytes = 6144;

template <typename Kernel>
struct TileLoops {
  // Activations that stay in the L2 cache while all tiles pass by.
  static constexpr int64_t kBlockBytes = 192 * 1024;

  const PackedMatrix& w;
  const Activations& x;
  float* y;
  int64_t ld_y;
  bool accumulate;

  template <int Rows, int Tiles, bool kStreams>
  void run(int t, int tile) const {
    const TileOutput out = {y + t * ld_y + tile * kTileChannels, ld_y, w.N - tile * kTileChannels,
                            accumulate};
    Kernel::template run<Rows, Tiles, kStreams>(w.data + tile * Kernel::tile_bytes(w.K), w.K, x, t,
                                                out);
  }

  // All rows there are, few enough for a register block.
  template <int Rows>
  void run_few(int rows, int tile_begin, int tile_end) const {
    if constexpr (Rows > 0) {
      if (rows != Rows) return run_few<Rows - 1>(rows, tile_begin, tile_end);
      constexpr int kTiles = Kernel::few_tiles(Rows);
      int tile = tile_begin;
      for (; tile + kTiles <= tile_end; tile += kTiles) run<Rows, kTiles, true>(0, tile);
      for (; tile < tile_end; ++tile) run<Rows, 1, true>(0, tile);
    }
  }

  template <int Rows, int Tiles, bool kStreams>
  void run_block(int rows, int t, int tile) const {
    if constexpr (Rows > 0) {
      if (rows != Rows) return run_block<Rows - 1, Tiles, kStreams>(rows, t, tile);
      run<Rows, Tiles, kStreams>(t, tile);
    }
  }

  // The next register block of `rows` rows: the last two are about equal, since a block of one or
  // two rows costs nearly as much as one of more.
  static int next_rows(int rows) {
    constexpr int kRows = Kernel::kBlockRows;
    if (rows <= kRows) return rows;
    return rows >= 2 * kRows ? kRows : (rows + 1) / 2;
  }

  // Rows [t, t_end) of some tiles: the first block reads the weights, the others find them in the
  // cache.
  template <int Tiles>
  void run_blocks(int t, int t_end, int tile) const {
    int rows = next_rows(t_end - t);
    run_block<Kernel::kBlockRows, Tiles, true>(rows, t, tile);
    for (t += rows; t < t_end; t += rows) {
      rows = next_rows(t_end - t);
      run_block<Kernel::kBlockRows, Tiles, false>(rows, t, tile);
    }
  }

  void gemm(int T, int tile_begin, int tile_end) const {
    constexpr int kRows = Kernel::kBlockRows, kTiles = Kernel::kBlockTiles;
    if (T <= Kernel::kFewRows) return run_few<Kernel::kFewRows>(T, tile_begin, tile_end);
    const int64_t units = kBlockBytes / (Kernel::row_bytes(w.K) * kRows);
    const int block = units < 2 ? 2 * kRows : static_cast<int>(units) * kRows;
    for (int t0 = 0; t0 < T; t0 += block) {
      const int t_end = T - t0 < block ? T : t0 + block;
      int tile = tile_begin;
      for (; tile + kTiles <= tile_end; tile += kTiles) run_blocks<kTiles>(t0, t_end, tile);
      for (; tile < tile_end; ++tile) run_blocks<1>(t0, t_end, tile);
    }
  }
};

// All of `Kernel` for T rows and these tiles. Kernels are local to their file, and so is each of
// these.
template <typename Kernel>
void gemm_tiles(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                int tile_begin, int tile_end, bool accumulate) {
  TileLoops<Kernel>{w, x, y, ld_y, accumulate}.gemm(T, tile_begin, tile_end);
}

}  // namespace fulcrum
