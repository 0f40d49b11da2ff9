// Which instruction sets this machine can run, asked once at load.
#pragma once

namespace fulcrum {

// All that there are, whatever this machine has; each includes the ones before it. "avx2" has FMA
// and F16C, "avx512" VNNI, "amx" tiles of int8 and bf16.
static constexpr const char* kIsas[] = {"portable", "avx2", "avx512", "avx512-bf16", "amx"};

// The best one of this machine.
const char* detect_isa();

// Whether code compiled for `isa` runs here. False for an unknown name.
bool isa_supported(const char* isa);

}  // namespace fulcrum
