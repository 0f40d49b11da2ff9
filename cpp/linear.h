// Linear layers: weights in a format, packed for one instruction set, and the kernels over them.
// Raw pointers and sizes only; nothing here knows of requests, layers or torch.
//
// The same row of activations gives bit-identical results whatever T is and wherever the tile
// range begins and ends: integer dot products are exact, and scales are applied in float in
// ascending order of groups, by the same sequence of operations in the one-row and many-row code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/formats.h"

namespace fulcrum {

constexpr int kGroupSize = 32;  // values of K that share a scale, in weights and activations

// One weight matrix y = x @ w^T. `data` is 64-byte aligned and owned by the caller.
struct PackedMatrix {
  Format format = Format::kBf16;
  int N = 0;  // output channels
  int K = 0;  // input channels
  const uint8_t* data = nullptr;
};

// The input of a linear layer: the float rows and, for the integer formats, their int8 form.
// All buffers are the caller's; K is padded to a multiple of kGroupSize with zeros in the int8
// form. quantize_rows fills all the rest from values, widened and rounded where they are given.
struct Activations {
  const float* values = nullptr;  // (T, K), row stride ld_values
  int64_t ld_values = 0;
  int8_t* quantized = nullptr;  // (T, padded K)
  int16_t* widened = nullptr;   // (T, padded K): quantized in 16 bits, where reads_widened
  float* scales = nullptr;      // (T, groups): max |x| / 127 of each group, 0 for a zero group
  float* sums = nullptr;        // (T, groups): sum of the quantized values of the group
  float* totals = nullptr;      // (T, groups): scale * sum
  uint16_t* rounded = nullptr;  // (T, padded K): values in bf16, zeros after them, where
                                // reads_rounded
};

// Static, not inline: files with ISA flags include this header too, and the linker must not take
// their copy for everybody.
static constexpr int num_groups(int K) { return (K + kGroupSize - 1) / kGroupSize; }
static constexpr int padded_k(int K) { return num_groups(K) * kGroupSize; }

// Everything about linear layers that depends on the instruction set, chosen once at load.
struct LinearKernels {
  const char* isa;

  bool reads_widened;  // whether gemm wants Activations::widened for the integer formats
  bool reads_rounded;  // whether it wants Activations::rounded for the others

  // Output channels of a tile, the unit in which work is split between threads.
  int (*tile_channels)(Format format);

  // Bytes of the packed matrix, padding included.
  size_t (*packed_bytes)(Format format, int N, int K);

  // Packs rows [row_begin, row_end) of the matrix into `out` (packed_bytes(format, N, K) bytes).
  // row_begin is a multiple of tile_channels, so that threads can pack disjoint tiles.
  // kBf16: `values` are float rows. Else `quants` holds one value a byte (int8: signed; int4: 0…15;
  // fp8: e4m3), `scales` and `minima` one float for every group that shares them, a whole channel
  // included; w = scale * q, int4: scale * q + minimum, or scale * (q - 8) where it is symmetric.
  // Pointers are to row `row_begin`, rows are padded_k(K) (quants), K (values) and num_groups(K)
  // (scales, minima) long.
  void (*pack)(Format format, int N, int K, int row_begin, int row_end, const float* values,
               const uint8_t* quants, const float* scales, const float* minima, uint8_t* out);

  // Decodes one row of the packed matrix to float: the embedding look-up. out: (K,)
  void (*unpack_row)(const PackedMatrix& w, int row, float* out);

  // Fills the int8 form of rows [row_begin, row_end).
  void (*quantize_rows)(const Activations& x, int K, int row_begin, int row_end);

  // y[t, n] = (accumulate ? y[t, n] : 0) + x[t] · w[n] for every t < T and every channel n of the
  // tiles [tile_begin, tile_end). y has row stride ld_y; channels beyond N are not written.
  // Allocates nothing.
  void (*gemm)(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
               int tile_begin, int tile_end, bool accumulate);
};

// The table of one instruction set (isa.h), or nullptr where this build has none of that name. The
// caller checks that the machine supports it.
const LinearKernels* linear_kernels(const char* isa);

}  // namespace fulcrum
