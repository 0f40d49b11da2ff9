// What a step reads and writes: flat arrays that the caller owns and binds once.
#pragma once

#include <cstdint>

namespace fulcrum {

// T tokens, B sequences, R rows that need logits, M blocks per sequence, V vocabulary. See
// engine/step_buffers.py for the meaning of each; capacities are in Limits.
struct Batch {
  const int32_t* token_ids = nullptr;     // (T,)
  const int32_t* positions = nullptr;     // (T,)
  const int32_t* slot_mapping = nullptr;  // (T,)
  const int32_t* query_start = nullptr;   // (B + 1,)
  const int32_t* seq_lens = nullptr;      // (B,)
  const int32_t* block_table = nullptr;   // (B, M)
  const int32_t* logits_rows = nullptr;   // (R,)

  // Where the model reads hidden states: those before each token, in any order.
  const float* previous_hidden = nullptr;  // (any, D)
  const int32_t* previous_rows = nullptr;  // (T,) rows of previous_hidden

  const int32_t* target_ids = nullptr;  // (R,) and so all below, but the flat lists
  const float* temperature = nullptr;
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const float* repetition_penalty = nullptr;
  const float* presence_penalty = nullptr;
  const float* frequency_penalty = nullptr;
  const int32_t* top_k = nullptr;
  const int32_t* num_logprobs = nullptr;
  const uint64_t* seed = nullptr;
  const int32_t* noise_position = nullptr;
  const int32_t* history_start = nullptr;
  const int32_t* history_output_start = nullptr;
  const int32_t* history_end = nullptr;
  const int32_t* bias_start = nullptr;   // (R + 1,)
  const int32_t* history_ids = nullptr;  // flat
  const int32_t* bias_ids = nullptr;     // flat
  const float* bias_values = nullptr;    // flat

  int32_t* sampled_ids = nullptr;     // (R,), -1 where the row could not be sampled
  float* sampled_logprobs = nullptr;  // (R,)
  int32_t* top_ids = nullptr;         // (R, kMaxLogprobs)
  float* top_logprobs = nullptr;      // (R, kMaxLogprobs)
  float* logits = nullptr;            // (R, V), optional
  // Hidden states after the final norm, optional: token t's goes to row hidden_rows[t], if any.
  float* hidden = nullptr;               // (any, D)
  const int32_t* hidden_rows = nullptr;  // (T,), -1: not wanted
};

// Capacities of the bound buffers.
struct Limits {
  int max_tokens = 0;          // T
  int max_sequences = 0;       // B
  int max_rows = 0;            // R
  int max_blocks_per_seq = 0;  // M
  int64_t history_ids = 0;
  int64_t bias_ids = 0;
  int64_t logits_rows = 0;  // rows of the optional logits buffer
  int64_t hidden_rows = 0;  // rows of the optional hidden states
};

}  // namespace fulcrum
