// What the machine can do at most, for the roofline bench: loops over the instructions that the
// linear kernels are made of, with nothing else around them. Declarations only: this header is
// included by files compiled with ISA flags.
#pragma once

#include <cstdint>

namespace fulcrum {

// Memory is read as four neighbouring parts at once: the hardware follows each of them, which makes
// one core up to 1.6 times as fast as a single part does, and asking for lines ahead only slows it.
constexpr int kReadParts = 4;
constexpr int kReadMultiple = kReadParts * 256;

// A loop on one thread; returns the operations it did, two a multiply-add. Nothing in it waits for
// memory or, by enough independent chains, for a result.
using PeakLoop = double (*)(int64_t num_iterations);

struct PeakLoops {
  PeakLoop int8;  // exact products of 8-bit weights and activations, added in 32 bits
  PeakLoop int4;  // the same with 4-bit weights, where the instruction set gains from that
  PeakLoop bf16;  // bf16 weights, widened before, times floats where nothing multiplies pairs

  // Reads num_bytes (a multiple of kReadMultiple, 64-byte aligned) and returns a value that depends
  // on all of them, so that no load can be left out.
  uint64_t (*read)(const uint8_t* data, int64_t num_bytes);
};

PeakLoops peak_loops_portable();
PeakLoops peak_loops_avx2();
PeakLoops peak_loops_avx512();
PeakLoops peak_loops_avx512_bf16();
PeakLoops peak_loops_amx();

}  // namespace fulcrum
