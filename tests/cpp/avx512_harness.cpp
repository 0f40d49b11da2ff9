// C interface to the linear and vector kernels for test_avx512_emulated.py, which links it with the
// emulated AVX-512 files and calls it through ctypes.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "linear.h"
#include "ops.h"

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

// y (T, N) in and out; the int8 form of x (T, K) is the portable one, but where an instruction set
// has another form beside it.
extern "C" void gemm(const char* isa, int format, int N, int K, int T, const float* values,
                     const uint8_t* quants, const float* scales, const float* minima,
                     const float* x, float* y, int tile_begin, int tile_end, int accumulate) {
  const LinearKernels* kernels = linear_kernels(isa);
  const Packed packed(kernels, static_cast<Format>(format), N, K, values, quants, scales, minima);
  std::vector<int8_t> quantized(size_t(T) * padded_k(K));
  std::vector<float> row_scales(size_t(T) * num_groups(K)), sums(row_scales.size()),
      totals(sums.size());
  std::vector<uint16_t> rounded(quantized.size());
  const Activations rows = {x,
                            K,
                            quantized.data(),
                            nullptr,
                            row_scales.data(),
                            sums.data(),
                            totals.data(),
                            rounded.data()};
  linear_kernels(kernels->reads_rounded ? isa : "portable")->quantize_rows(rows, K, 0, T);
  kernels->gemm(packed.matrix, rows, T, y, N, tile_begin, tile_end, accumulate != 0);
}

// The int8 form of x (T, K): quantized (T, padded K), the others (T, groups).
extern "C" void quantize(const char* isa, int T, int K, const float* x, int8_t* quantized,
                         float* scales, float* sums, float* totals) {
  const Activations rows = {x, K, quantized, nullptr, scales, sums, totals};
  linear_kernels(isa)->quantize_rows(rows, K, 0, T);
}

extern "C" void unpack(const char* isa, int format, int N, int K, const float* values,
                       const uint8_t* quants, const float* scales, const float* minima,
                       float* out) {
  const LinearKernels* kernels = linear_kernels(isa);
  const Packed packed(kernels, static_cast<Format>(format), N, K, values, quants, scales, minima);
  for (int n = 0; n < N; ++n) kernels->unpack_row(packed.matrix, n, out + int64_t{n} * K);
}

extern "C" void rms_norm(const char* isa, const float* x, const float* weight, int n, float* out) {
  vector_kernels(isa)->rms_norm(x, weight, 1e-5f, n, out);
}

extern "C" void gate(const char* isa, int activation, const float* gate, const float* up, int n,
                     float* out) {
  vector_kernels(isa)->gate(static_cast<Activation>(activation), gate, up, n, out);
}

// Attention of the last T of S tokens of one KV head: queries and out (T, H, HD), keys and values
// (S, HD). tile_tokens queries are computed at a time, over a cache that lies in order.
extern "C" void attend(const char* isa, int kv_dtype, int T, int S, int H, int HD, int window,
                       int tile_tokens, const float* queries, const float* keys,
                       const float* values, float* out) {
  const VectorKernels* kernels = vector_kernels(isa);
  const KvDtype dtype = static_cast<KvDtype>(kv_dtype);
  const int64_t stride = KvBlockLayout(dtype, HD).bytes;
  const int num_blocks = (S + kBlockSize - 1) / kBlockSize;
  std::vector<int32_t> table(num_blocks);
  for (int i = 0; i < num_blocks; ++i) table[i] = i;
  std::vector<uint8_t> blocks(num_blocks * stride);
  for (int s = 0; s < S; ++s) {
    kernels->write_kv(dtype)(keys + s * HD, values + s * HD, HD, s % kBlockSize,
                             blocks.data() + s / kBlockSize * stride);
  }
  std::vector<float> scratch(attention_scratch_floats(HD));
  for (int t = 0; t < T; t += tile_tokens) {
    const AttentionUnit unit = {.queries = queries + t * H * HD,
                                .out = out + t * H * HD,
                                .ld_queries = H * HD,
                                .ld_out = H * HD,
                                .num_tokens = std::min(tile_tokens, T - t),
                                .num_heads = H,
                                .head_dim = HD,
                                .first_position = S - T + t,
                                .window = window,
                                .block_table = table.data(),
                                .kv = blocks.data(),
                                .block_stride = stride,
                                .group_stride = kBlocksTogether * stride};
    kernels->attend(dtype)(unit, scratch.data());
  }
}
