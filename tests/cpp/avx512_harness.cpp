// C interface to the linear kernels for test_avx512_emulated.py, which links it with an emulated
// linear_avx512.cpp and calls it through ctypes.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "linear.h"

using namespace fulcrum;

namespace {

struct Packed {
  Packed(const LinearKernels* kernels, Format format, int N, int K, const float* values,
         const uint8_t* quants, const float* scales, const float* minima) {
    const size_t bytes = kernels->packed_bytes(format, N, K);
    data = static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    kernels->pack(format, N, K, 0, N, values, quants, scales, minima, data);
    matrix = {format, N, K, data};
  }
  ~Packed() { std::free(data); }
  uint8_t* data;
  PackedMatrix matrix;
};

}  // namespace

// y (T, N) in and out; the int8 form of x (T, K) is the portable one for every instruction set.
extern "C" void gemm(const char* isa, int format, int N, int K, int T, const float* values,
                     const uint8_t* quants, const float* scales, const float* minima,
                     const float* x, float* y, int tile_begin, int tile_end, int accumulate) {
  const LinearKernels* kernels = linear_kernels(isa);
  const Packed packed(kernels, static_cast<Format>(format), N, K, values, quants, scales, minima);
  std::vector<int8_t> quantized(size_t(T) * padded_k(K));
  std::vector<float> row_scales(size_t(T) * num_groups(K)), sums(row_scales.size());
  const Activations rows = {x, K, quantized.data(), row_scales.data(), sums.data()};
  linear_kernels("portable")->quantize_rows(rows, K, 0, T);
  kernels->gemm(packed.matrix, rows, T, y, N, tile_begin, tile_end, accumulate != 0);
}

extern "C" void unpack(const char* isa, int format, int N, int K, const float* values,
                       const uint8_t* quants, const float* scales, const float* minima,
                       float* out) {
  const LinearKernels* kernels = linear_kernels(isa);
  const Packed packed(kernels, static_cast<Format>(format), N, K, values, quants, scales, minima);
  for (int n = 0; n < N; ++n) kernels->unpack_row(packed.matrix, n, out + int64_t{n} * K);
}
