// Tiles of AMX, which multiply matrices: up to 16 rows of 64 bytes each. Included only by files
// compiled with its flags; isa.cpp asks the system for the right to use it.
#pragma once

#include <cstdint>

#include "intrinsics.h"

namespace fulcrum {
namespace {

constexpr int kAmxRows = 16;      // of a tile register, at most
constexpr int kAmxRowBytes = 64;  // likewise

// The shapes of the tile registers, as ldtilecfg reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

// What was written to memory is there for the tile instructions that follow: their intrinsics do
// not tell the compiler all that they read.
inline void publish_to_tiles() { asm volatile("" ::: "memory"); }

// The tile registers of a thread, from here to the end of the scope. Released, they cost nothing
// where the system switches between threads.
class TileScope {
 public:
  explicit TileScope(const TileShapes& shapes) {
    publish_to_tiles();
    _tile_loadconfig(&shapes);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace
}  // namespace fulcrum
