// The vector intrinsics of x86-64: the compiler's, or those of a header that a test names, which
// has them in plain C++ for machines without the instructions.
#pragma once

#if defined(FULCRUM_EMULATED_INTRINSICS)
#include FULCRUM_EMULATED_INTRINSICS
#else
#include <immintrin.h>
#endif
