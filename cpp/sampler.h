// From one row of logits to a token: penalties, bias, temperature, truncation, the draw and the log
// probabilities. model.cpp calls it for each row that needs logits, from any thread of the pool.
//
// Order of operations, as transformers' and vLLM's:
//   1. repetition penalty over prompt and output (Keskar et al., CTRL, 2019, section 4.1: a
//   positive
//      logit is divided by it, a negative one multiplied), then presence and frequency penalties
//      over the output alone (OpenAI's definition: subtracted, the latter times the token's count);
//   2. bias, added; -inf bans a token;
//   3. temperature 0: the largest logit, the lowest id among equals, and nothing below applies;
//   4. division by the temperature;
//   5. top-k: the k most probable tokens;
//   6. top-p (Holtzman et al., The Curious Case of Neural Text Degeneration, 2020): the fewest most
//      probable tokens whose share of what top-k left is at least top_p;
//   7. min-p (Nguyen et al., Turning Up the Heat, 2024): tokens with at least min_p times the
//      probability of the most probable one;
//   8. the draw, by the noise of noise.h.
// Equally probable tokens are ordered by id, lowest first, so that each truncation keeps an exact
// set. Log probabilities are those of the row as it came in: step 1 has not touched it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fulcrum {

constexpr int kMaxLogprobs = 20;

// What one row asks for; the fields are engine/step_buffers.py's.
struct RowParams {
  float temperature = 1.0f;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t top_k = 0;           // 0: off
  int32_t target_id = -1;      // at least 0: sample nothing, report this id's log probability
  int32_t num_logprobs = -1;   // -1: none wanted; else the number of alternatives
  int32_t noise_position = 0;  // index in the sequence of the token being sampled
  uint64_t seed = 0;
  const int32_t* noise_ids = nullptr;    // (V,) ids that the noise is drawn for; null: the index
  const int32_t* history_ids = nullptr;  // (history_size,): prompt, then output
  int32_t history_size = 0;
  int32_t output_start = 0;            // index in history_ids of the first output token
  const int32_t* bias_ids = nullptr;   // (bias_size,)
  const float* bias_values = nullptr;  // (bias_size,)
  int32_t bias_size = 0;
};

enum class RowError : uint8_t {
  kNone,
  kNotFinite,     // a logit is NaN or +inf
  kAllBanned,     // every logit is -inf
  kIdOutOfRange,  // target, history or bias id outside the vocabulary
};

const char* describe(RowError error);

struct RowResult {
  RowError error = RowError::kNone;  // if set, id is -1 and the rest is undefined
  int32_t id = -1;                   // the sampled id, or target_id
  float logprob = 0.0f;              // of id; set where num_logprobs or target_id is at least 0
  int32_t num_top = 0;               // min(num_logprobs, V), at least 0
  int32_t top_ids[kMaxLogprobs] = {};
  float top_logprobs[kMaxLogprobs] = {};  // descending, the lower id first among equals
};

// Buffers of one thread, allocated once for the largest vocabulary it will see.
struct SamplerScratch {
  explicit SamplerScratch(int V);

  size_t bytes() const;

  std::vector<float> block_max;  // largest value of each block of the row
  std::vector<float> weights;    // (V + 1,) candidates' weights; one more is written, then dropped
  std::vector<uint32_t> ids;     // (V + 1,) candidates' ids
  std::vector<uint64_t> keys;    // (V,) sort keys
  std::vector<float> raw;        // (V,) the logits as they came, where log probabilities are wanted
  std::vector<int32_t> counts;   // (V,) all zero between calls
};

// Samples one row. `logits` (V,) is overwritten. V is at most the scratch's. Allocates nothing.
void sample_row(const RowParams& p, float* logits, int V, SamplerScratch& scratch, RowResult* out);

}  // namespace fulcrum
