// Every operation of a layer but the linear ones (linear.h) and sampling (sampler.h), once for
// each instruction set. Raw pointers and sizes; results of a row depend on nothing but the row.
#pragma once

#include <cstdint>

namespace fulcrum {

enum class Activation : uint8_t { kSilu, kGeluTanh };

constexpr int kBlockSize = 16;  // tokens in a KV block

// Blocks of a head that lie side by side in the cache.
constexpr uint32_t kBlocksTogether = 32;

enum class KvDtype : uint8_t { kBf16, kInt8 };

// Where things lie in a KV block of one layer and head, in bytes. Keys are (head_dim, kBlockSize),
// values (kBlockSize, head_dim): keys are read token-parallel, values channel-parallel, so that
// neither needs a horizontal sum. int8 adds a float32 scale for each token's key and value, max |x|
// / 127: (kBlockSize,) of the keys, then of the values. Outside of the dot products, where they
// cost a multiplication a token instead of one a channel. Every offset is a multiple of 64.
struct KvBlockLayout {
  constexpr KvBlockLayout(KvDtype dtype, int head_dim)
      : values(int64_t{head_dim} * kBlockSize * (dtype == KvDtype::kBf16 ? 2 : 1)),
        key_scales(2 * values),
        value_scales(key_scales + scales_bytes(dtype)),
        bytes(value_scales + scales_bytes(dtype)) {}

  int64_t values;  // the keys are at 0
  int64_t key_scales;
  int64_t value_scales;
  int64_t bytes;

 private:
  static constexpr int64_t scales_bytes(KvDtype dtype) {
    return dtype == KvDtype::kBf16 ? 0 : kBlockSize * sizeof(float);
  }
};

// What one attention unit reads: the query rows of one sequence that share a KV head.
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
  const uint8_t* kv;           // of this layer and KV head, block 0
  // Bytes from one block to the next, same layer and head, and from the first of kBlocksTogether
  // blocks to the first of the next ones.
  int64_t block_stride;
  int64_t group_stride;

  const uint8_t* block(int32_t index) const {
    const uint32_t i = static_cast<uint32_t>(index);
    return kv + i / kBlocksTogether * group_stride + i % kBlocksTogether * block_stride;
  }
};

constexpr int kMaxTileTokens = 16;    // query tokens of an attention unit
constexpr int kMaxTileRows = 64;      // query tokens x heads of an attention unit
constexpr int kAttentionChunk = 128;  // keys between two updates of the online softmax
constexpr int kMostLanes = 16;        // of a vector of floats, in any instruction set

// Keys whose softmax is taken by itself; segments are merged in position order. So several threads
// can share the keys of one sequence, and a row's result does not tell whether they did.
constexpr int kAttentionSegment = 512;
static_assert(kAttentionSegment == kBlocksTogether * kBlockSize);

struct SegmentRange {
  int begin, end;
};

// Segments that hold the keys of the query tokens [first_position, first_position + num_tokens).
inline SegmentRange attention_segments(int first_position, int num_tokens, int window) {
  const int first_seen = window > 0 && first_position >= window ? first_position - window + 1 : 0;
  const int end = first_position + num_tokens;
  return {first_seen / kAttentionSegment, (end - 1) / kAttentionSegment + 1};
}

// Floats of a segment's state for so many rows: sums, maxima and totals.
inline int64_t attention_state_floats(int num_rows, int head_dim) {
  return int64_t{num_rows} * (head_dim + 2);
}

// Floats of scratch memory that attend and attend_segment need, for one thread.
inline int64_t attention_scratch_floats(int head_dim) {
  return kMaxTileRows * (kAttentionChunk + int64_t{head_dim} + kMostLanes) +
         2 * attention_state_floats(kMaxTileRows, head_dim);
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
  using Attend = void (*)(const AttentionUnit& unit, float* scratch);
  Attend attend_bf16, attend_int8;

  // attend in parts: the state of one of the unit's segments, then `out` from the states of all of
  // them in order, attention_state_floats each. The result is that of attend, bit for bit.
  using AttendSegment = void (*)(const AttentionUnit& unit, int segment, float* scratch,
                                 float* state);
  AttendSegment attend_segment_bf16, attend_segment_int8;
  void (*merge_segments)(const AttentionUnit& unit, float* states, int num_segments,
                         float* scratch);

  // Writes one token's key and value of one head, (head_dim,) each, into slot `offset` of its
  // block: rounded to bf16, or to int8 with a scale of its own.
  using WriteKv = void (*)(const float* key, const float* value, int head_dim, int offset,
                           uint8_t* block);
  WriteKv write_kv_bf16, write_kv_int8;

  Attend attend(KvDtype dtype) const { return dtype == KvDtype::kBf16 ? attend_bf16 : attend_int8; }
  AttendSegment attend_segment(KvDtype dtype) const {
    return dtype == KvDtype::kBf16 ? attend_segment_bf16 : attend_segment_int8;
  }
  WriteKv write_kv(KvDtype dtype) const {
    return dtype == KvDtype::kBf16 ? write_kv_bf16 : write_kv_int8;
  }
};

// The table of one instruction set, or nullptr where this build has none of that name.
const VectorKernels* vector_kernels(const char* isa);

}  // namespace fulcrum
