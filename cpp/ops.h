// Every operation of a layer but the linear ones (linear.h) and sampling (sampler.h), once for
// each instruction set. Raw pointers and sizes; results of a row depend on nothing but the row.
#pragma once

#include <cstdint>

namespace fulcrum {

enum class Activation : uint8_t { kSilu, kGeluTanh };

constexpr int kBlockSize = 16;  // tokens in a KV block

// What one attention unit reads: the query rows of one sequence that share a KV head.
// KV blocks hold, per layer and KV head, keys as (head_dim, kBlockSize) and values as
// (kBlockSize, head_dim), bf16: keys are read token-parallel, values channel-parallel, so that
// neither needs a horizontal sum.
struct AttentionUnit {
  const float* queries;  // (num_tokens, num_heads, head_dim), scaled; token stride below
  float* out;            // likewise
  int64_t ld_queries;
  int64_t ld_out;
  int num_tokens;  // query tokens of the tile, at most kMaxTileTokens
  int num_heads;   // query heads that share the KV head
  int head_dim;
  int first_position;          // position of the first query token; the others follow
  int window;                  // tokens a query sees, itself included; 0: all before it
  const int32_t* block_table;  // blocks of the sequence, in position order
  const uint16_t* keys;        // of this layer and KV head, block 0
  const uint16_t* values;
  int64_t block_stride;  // uint16 elements from one block to the next, same layer and head
};

constexpr int kMaxTileTokens = 16;   // query tokens of an attention unit
constexpr int kMaxTileRows = 64;     // query tokens x heads of an attention unit
constexpr int kAttentionChunk = 64;  // keys between two updates of the online softmax

// Floats of scratch memory that attend needs, for one thread.
inline int64_t attention_scratch_floats(int head_dim) {
  return int64_t{kMaxTileRows} * (kAttentionChunk + head_dim + 2);
}

struct VectorKernels {
  const char* isa;

  // out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019). out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);

  void (*add)(float* y, const float* x, int n);  // y += x
  void (*scale)(float* y, float factor, int n);  // y *= factor

  // out = activation(gate) * up. out may be gate.
  void (*gate)(Activation activation, const float* gate, const float* up, int n, float* out);

  // Rotates a head by the angles of its position, channel i with channel i + head_dim / 2
  // (Su et al. 2021). cos, sin: (head_dim / 2,)
  void (*rotate)(float* head, const float* cos, const float* sin, int head_dim);

  // Softmax attention over the paged cache, keys in position order, in chunks whose bounds are
  // multiples of kAttentionChunk, so that a row's result does not depend on its tile.
  void (*attend)(const AttentionUnit& unit, float* scratch);
};

// The table of one instruction set, or nullptr where this build has none of that name.
const VectorKernels* vector_kernels(const char* isa);

// Writes one token's key and value of one head into its slot, rounded to bf16.
// key_block: (head_dim, kBlockSize), value_block: (kBlockSize, head_dim).
void write_kv(const float* key, const float* value, int head_dim, int offset, uint16_t* key_block,
              uint16_t* value_block);

}  // namespace fulcrum
