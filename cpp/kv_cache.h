// The paged KV cache: blocks of kBlockSize tokens, each holding all layers' heads of its tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"
#include "ops.h"

namespace fulcrum {

// Layout, bf16: (num_layers, num_blocks, num_kv_heads, {key, value}, head_dim * kBlockSize).
// A layer's blocks lie together, since a step walks one layer at a time.
struct KvCache {
  Buffer memory;
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int num_blocks = 0;

  static int64_t block_bytes(int num_layers, int num_kv_heads, int head_dim) {
    return int64_t{num_layers} * num_kv_heads * 2 * head_dim * kBlockSize * 2;
  }
  int64_t head_elements() const { return int64_t{head_dim} * kBlockSize; }
  int64_t block_stride() const { return num_kv_heads * 2 * head_elements(); }
  uint16_t* keys(int layer, int kv_head) const {
    return memory.as<uint16_t>() + int64_t{layer} * num_blocks * block_stride() +
           kv_head * 2 * head_elements();
  }
  uint16_t* values(int layer, int kv_head) const { return keys(layer, kv_head) + head_elements(); }
};

}  // namespace fulcrum
