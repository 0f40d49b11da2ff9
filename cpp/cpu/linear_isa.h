// The parts of LinearKernels that are written once per instruction set; linear.cpp joins them
// with the packing code of the layout they read. Declarations only: this header is included by
// files compiled with ISA flags.
#pragma once

#include "linear.h"

namespace fulcrum {

void quantize_rows_portable(const Activations& x, int K, int row_begin, int row_end);
void gemm_portable(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                   int tile_begin, int tile_end, bool accumulate);

void quantize_rows_avx2(const Activations& x, int K, int row_begin, int row_end);
void gemm_avx2(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
               int tile_begin, int tile_end, bool accumulate);

void gemm_float_avx2(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                     int tile_begin, int tile_end, bool accumulate);  // of gemm_avx2

void quantize_rows_avx512(const Activations& x, int K, int row_begin, int row_end);
void gemm_avx512(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                 int tile_begin, int tile_end, bool accumulate);
void gemm_float_avx512(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                       int tile_begin, int tile_end, bool accumulate);  // of gemm_avx512

// The float formats by vdpbf16ps, the others by gemm_avx512.
void gemm_avx512_bf16(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
                      int tile_begin, int tile_end, bool accumulate);

// The float formats by AMX from rows that quantize_rows_amx rounded, the others by gemm_avx512.
void quantize_rows_amx(const Activations& x, int K, int row_begin, int row_end);
void gemm_amx(const PackedMatrix& w, const Activations& x, int T, float* y, int64_t ld_y,
              int tile_begin, int tile_end, bool accumulate);

}  // namespace fulcrum
