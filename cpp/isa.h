// Which instruction sets this machine can run, asked once at load.
#pragma once

namespace fulcrum {

// Best of "avx512" (with VNNI), "avx2" (with FMA and F16C) and "portable".
const char* detect_isa();

// Whether code compiled for `isa` runs here. False for an unknown name.
bool isa_supported(const char* isa);

}  // namespace fulcrum
