// Peak of x86-64 with AMX: products of whole tile registers, and else the loops of peak_avx512.cpp.
// Compiled with ISA flags, so everything but the entry point is local to the file.
#include "cpu/amx.h"
#include "cpu/peak.h"

namespace fulcrum {
namespace {

constexpr int kProducts = 4;  // of two registers of rows with two of channels

TileShapes whole_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kAmxRows, kAmxRowBytes);
  return shapes;
}

// products(): kProducts of them, of registers 4…7 to 0…3.
template <typename Products>
double run(int64_t num_iterations, int element_bytes, Products products) {
  alignas(64) static constexpr uint8_t kZeros[kAmxRows * kAmxRowBytes] = {};
  const TileScope scope(whole_tiles());
  _tile_loadd(4, kZeros, kAmxRowBytes);
  _tile_loadd(5, kZeros, kAmxRowBytes);
  _tile_loadd(6, kZeros, kAmxRowBytes);
  _tile_loadd(7, kZeros, kAmxRowBytes);
  for (int64_t i = 0; i < num_iterations; ++i) products();
  constexpr double kOutputs = kAmxRows * kAmxRows;
  return 2 * kOutputs * (kAmxRowBytes / element_bytes) * kProducts *
         static_cast<double>(num_iterations);
}

double run_bytes(int64_t num_iterations) {
  return run(num_iterations, 1, [] {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  });
}

double run_bf16(int64_t num_iterations) {
  return run(num_iterations, 2, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

}  // namespace

PeakLoops peak_loops_amx() {
  PeakLoops loops = peak_loops_avx512();
  loops.int8 = loops.int4 = run_bytes;
  loops.bf16 = run_bf16;
  return loops;
}

}  // namespace fulcrum
