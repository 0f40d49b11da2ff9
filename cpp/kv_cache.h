// The paged KV cache: blocks of kBlockSize tokens, each holding all layers' heads of its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "memory.h"
#include "ops.h"

namespace fulcrum {

inline KvDtype parse_kv_dtype(const std::string& name) {
  if (name == "bf16") return KvDtype::kBf16;
  if (name == "int8") return KvDtype::kInt8;
  throw std::invalid_argument("unknown KV dtype " + name + ": choose bf16 or int8");
}

// Layout: (num_layers, groups of kBlocksTogether blocks, num_kv_heads, kBlocksTogether,
// KvBlockLayout::bytes). A layer's blocks lie together, since a step walks one layer at a time, and
// so do those of a head, as long as a segment of attention: the processor foresees what is read in
// one long run.
struct KvCache {
  Buffer memory;
  KvDtype dtype = KvDtype::kBf16;
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int num_blocks = 0;

  // Of one block in all layers, scales included.
  static int64_t block_bytes(KvDtype dtype, int num_layers, int num_kv_heads, int head_dim) {
    return int64_t{num_layers} * num_kv_heads * KvBlockLayout(dtype, head_dim).bytes;
  }
  void allocate() { memory = Buffer(num_layers * num_groups() * group_stride()); }

  int64_t block_stride() const { return KvBlockLayout(dtype, head_dim).bytes; }
  int64_t group_stride() const { return kBlocksTogether * num_kv_heads * block_stride(); }
  int64_t num_groups() const { return (num_blocks + kBlocksTogether - 1) / kBlocksTogether; }
  uint8_t* block(int layer, int64_t block_index, int kv_head) const {
    const int64_t group = layer * num_groups() + block_index / kBlocksTogether;
    const int64_t block = int64_t{kv_head} * kBlocksTogether + block_index % kBlocksTogether;
    return memory.data() + group * group_stride() + block * block_stride();
  }
};

}  // namespace fulcrum
