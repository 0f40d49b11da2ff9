// The tables of linear kernels: joins each instruction set's arithmetic with the code that packs
// and decodes the layout it reads (packing.h). Called at load.
#include "linear.h"

#include <cstring>

#include "cpu/linear_isa.h"
#include "formats/packing.h"

namespace fulcrum {
namespace {

int tile_channels(Format) { return kTileChannels; }

template <typename Layout>
constexpr LinearKernels kernels_over(const char* isa, bool reads_widened, bool reads_rounded,
                                     decltype(LinearKernels::quantize_rows) quantize_rows,
                                     decltype(LinearKernels::gemm) gemm) {
  return {isa,          reads_widened,      reads_rounded, tile_channels, packed_bytes<Layout>,
          pack<Layout>, unpack_row<Layout>, quantize_rows, gemm};
}

constexpr LinearKernels kPortable =
    kernels_over<PortableLayout>("portable", false, false, quantize_rows_portable, gemm_portable);

#if defined(__x86_64__)
constexpr LinearKernels kAvx2 =
    kernels_over<Lanes256>("avx2", true, false, quantize_rows_avx2, gemm_avx2);
constexpr LinearKernels kAvx512 =
    kernels_over<Lanes512>("avx512", false, false, quantize_rows_avx512, gemm_avx512);
constexpr LinearKernels kAvx512Bf16 = kernels_over<Lanes512Pairs>(
    "avx512-bf16", false, false, quantize_rows_avx512, gemm_avx512_bf16);
constexpr LinearKernels kAmx =
    kernels_over<Lanes512Pairs>("amx", false, true, quantize_rows_amx, gemm_amx);
#endif

}  // namespace

const LinearKernels* linear_kernels(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) return &kAvx2;
  if (std::strcmp(isa, "avx512") == 0) return &kAvx512;
  if (std::strcmp(isa, "avx512-bf16") == 0) return &kAvx512Bf16;
  if (std::strcmp(isa, "amx") == 0) return &kAmx;
#endif
  return std::strcmp(isa, "portable") == 0 ? &kPortable : nullptr;
}

}  // namespace fulcrum
