// The shape that the packed layouts of the vector instruction sets share: a tile is 16 output
// channels, stored group after group of K, so that a kernel reads one ascending stream. Where a
// weight lies inside a group differs with the width of the registers and is a template argument
// of the packing code (`Lanes`). Headers of formats/ declare data and layouts; the functions in
// them are for files compiled without ISA flags only.
#pragma once

namespace fulcrum {

constexpr int kTileChannels = 16;

struct Lanes256 {};  // AVX2: 8 lanes of 32 bits, a tile is two halves of 8 channels
struct Lanes512 {};  // AVX-512: 16 lanes of 32 bits, a tile is one register

}  // namespace fulcrum
