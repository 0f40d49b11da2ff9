#include "isa.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fulcrum {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives tile registers to processes that ask for them, for all their threads.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
         may_use_tiles();
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

}  // namespace

const char* detect_isa() {
  const char* best = kIsas[0];
  for (const char* isa : kIsas) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

bool isa_supported(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return true;
  if (std::strcmp(isa, "avx2") == 0) return has_avx2();
  if (std::strcmp(isa, "avx512") == 0) return has_avx512();
  if (std::strcmp(isa, "avx512-bf16") == 0) return has_avx512_bf16();
  if (std::strcmp(isa, "amx") == 0) return has_amx();
  return false;
}

}  // namespace fulcrum
