// Model's last part of a step: the rows that need logits, through the final norm and the head to
// their samples. Called by the forward pass in model.cpp.
#include <algorithm>

#include "model.h"

namespace fulcrum {

// out = norm(hidden) of one token: what the head reads.
void Model::norm_final(int64_t t, float* out) {
  const Config& c = config_;
  const FloatVector& post_norm = weights_.layers.back().mlp_post_norm;
  float* hidden = state_.hidden + t * c.hidden_size;
  if (!post_norm.empty()) {
    float* branch = state_.branch + t * c.hidden_size;
    vector_->rms_norm(branch, post_norm.data(), c.norm_eps, c.hidden_size, branch);
    vector_->add(hidden, branch, c.hidden_size);
  }
  vector_->rms_norm(hidden, weights_.final_norm.data(), c.norm_eps, c.hidden_size, out);
}

// Logits of the rows that need them, a chunk at a time, and their samples. The hidden states that
// somebody wants are normed first, all at once.
void Model::sample(const Step& step, int thread) {
  const Config& c = config_;
  const int D = c.hidden_size, V = head().packed.N;
  const Activations normed = state_.shared.activations(state_.shared.normed, D);
  const auto kept = [&](int64_t t) -> float* {
    if (batch_.hidden == nullptr || batch_.hidden_rows[t] < 0) return nullptr;
    return batch_.hidden + int64_t{batch_.hidden_rows[t]} * D;
  };
  if (batch_.hidden != nullptr) {
    for_units(thread, step.num_tokens, [&](int t) {
      if (float* row = kept(t)) norm_final(t, row);
    });
  }
  for (int first = 0; first < step.num_rows; first += kLogitsChunk) {
    const int num_rows = std::min(kLogitsChunk, step.num_rows - first);
    for_units(thread, num_rows, [&](int i) {
      const int64_t t = batch_.logits_rows[first + i];
      float* row = state_.shared.normed + int64_t{i} * D;
      if (const float* known = kept(t)) {
        std::copy_n(known, D, row);
      } else {
        norm_final(t, row);
      }
      linear_->quantize_rows(normed, D, i, i + 1);
    });
    multiply(thread, {&head()}, normed, num_rows, state_.logits, V, false);
    for_units(thread, num_rows,
              [&](int i) { sample_one(first + i, state_.logits + int64_t{i} * V, thread); });
  }
}

void Model::sample_one(int row, float* logits, int thread) {
  const Batch& b = batch_;
  const int V = head().packed.N;
  const std::vector<int32_t>& head_ids = weights_.head_ids;
  if (b.logits != nullptr) std::copy(logits, logits + V, b.logits + int64_t{row} * V);
  RowParams p;
  p.temperature = b.temperature[row];
  p.top_p = b.top_p[row];
  p.min_p = b.min_p[row];
  p.repetition_penalty = b.repetition_penalty[row];
  p.presence_penalty = b.presence_penalty[row];
  p.frequency_penalty = b.frequency_penalty[row];
  p.top_k = b.top_k[row];
  p.target_id = b.target_ids[row];
  p.num_logprobs = b.num_logprobs[row];
  p.noise_position = b.noise_position[row];
  p.seed = b.seed[row];
  p.noise_ids = head_ids.empty() ? nullptr : head_ids.data();
  p.history_ids = b.history_ids + b.history_start[row];
  p.history_size = b.history_end[row] - b.history_start[row];
  p.output_start = b.history_output_start[row] - b.history_start[row];
  p.bias_ids = b.bias_ids + b.bias_start[row];
  p.bias_values = b.bias_values + b.bias_start[row];
  p.bias_size = b.bias_start[row + 1] - b.bias_start[row];
  RowResult result;
  sample_row(p, logits, V, state_.sampler_scratch[thread], &result);
  if (result.error != RowError::kNone) {
    result.id = -1;
  } else if (!head_ids.empty()) {
    result.id = head_ids[result.id];
  }
  b.sampled_ids[row] = result.id;
  b.sampled_logprobs[row] = result.logprob;
  for (int i = 0; i < result.num_top; ++i) {
    b.top_ids[int64_t{row} * kMaxLogprobs + i] = result.top_ids[i];
    b.top_logprobs[int64_t{row} * kMaxLogprobs + i] = result.top_logprobs[i];
  }
}

}  // namespace fulcrum
