// Model's computing half: the forward pass. Every thread of the pool runs run_thread from top to
// bottom; an operation begins when all units of the one before are computed.
#include "model.h"

#include <algorithm>
#include <cmath>

namespace fulcrum {

void Model::step(int num_tokens, int num_sequences, int num_rows) {
  Step step{num_tokens, num_sequences, num_rows, 0, 0, num_tokens};
  check(step);
  if (num_tokens == 0) return;
  plan_kept(&step);
  plan_tiles(&step);
  plan_parts(&step);
  pool_->run(*this,
             {num_tokens, num_sequences, num_rows, step.num_tiles, step.num_parts, step.num_kept});
}

void Model::run_thread(int thread, const ThreadPool::Arguments& sizes) {
  const Step step{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  embed(step, thread);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    mix(step, layer, thread);
    if (is_cut(step, layer)) {
      transform_kept(step, layer, thread);
    } else {
      transform(step, layer, thread);
    }
  }
  sample(step, thread);
}

// The rows whose logits or hidden states are wanted: of most tokens of a prompt the last layer has
// to leave keys and values only.
void Model::plan_kept(Step* step) {
  kept_rows_.clear();
  for (int t = 0, r = 0; t < step->num_tokens; ++t) {
    const bool has_logits = r < step->num_rows && batch_.logits_rows[r] == t;
    r += has_logits;
    const bool is_read = batch_.hidden != nullptr && batch_.hidden_rows[t] >= 0;
    if (has_logits || is_read) kept_rows_.push_back(t);
  }
  const int num_kept = static_cast<int>(kept_rows_.size());
  if (step->num_tokens - num_kept >= kLeastSpared) step->num_kept = num_kept;
}

void Model::embed_token(int t, float* row) {
  linear_->unpack_row(weights_.embedding.packed, batch_.token_ids[t], row);
  if (config_.embedding_scale != 1) {
    vector_->scale(row, config_.embedding_scale, config_.hidden_size);
  }
}

// cos and sin of a token's position, for every table.
void Model::rotate_positions(int t) {
  const Config& c = config_;
  const int half = c.head_dim / 2;
  const int64_t table_size = int64_t{limits_.max_tokens} * half;
  const float position = static_cast<float>(batch_.positions[t]);
  for (size_t table = 0; table < c.rope_inv_freq.size(); ++table) {
    float* cos = state_.cos + table * table_size + int64_t{t} * half;
    float* sin = state_.sin + table * table_size + int64_t{t} * half;
    for (int i = 0; i < half; ++i) {
      const float angle = position * c.rope_inv_freq[table][i];
      cos[i] = std::cos(angle) * c.rope_attention_factor;
      sin[i] = std::sin(angle) * c.rope_attention_factor;
    }
  }
}

void Model::embed(const Step& step, int thread) {
  const int D = config_.hidden_size;
  if (!config_.reads_hidden) {
    return for_units(thread, step.num_tokens, [&](int t) {
      embed_token(t, state_.hidden + int64_t{t} * D);
      rotate_positions(t);
    });
  }
  const Activations x = state_.shared.activations(state_.shared.normed, 2 * int64_t{D});
  for_units(thread, step.num_tokens, [&](int t) {
    float* row = state_.shared.normed + 2 * int64_t{D} * t;
    const float* previous = batch_.previous_hidden + int64_t{D} * batch_.previous_rows[t];
    embed_token(t, row);
    vector_->rms_norm(row, weights_.embedding_norm.data(), config_.norm_eps, D, row);
    vector_->rms_norm(previous, weights_.hidden_norm.data(), config_.norm_eps, D, row + D);
    linear_->quantize_rows(x, 2 * D, t, t + 1);
    rotate_positions(t);
  });
  multiply(thread, {&weights_.input_projection}, x, step.num_tokens, state_.hidden, D, false);
}

// How the tokens of a sequence mix: keys and values to the cache, and what queries find there.
void Model::mix(const Step& step, int layer, int thread) {
  const Config& c = config_;
  const LayerWeights& w = weights_.layers[layer];
  static const FloatVector kNone;
  const Activations normed = norm_rows(
      step, w.attention_norm, layer > 0 ? weights_.layers[layer - 1].mlp_post_norm : kNone, thread);
  multiply(thread, {&w.q, &w.k, &w.v}, normed, step.num_tokens, state_.qkv, c.qkv_size(), false);
  rotate_and_cache(step, layer, thread);
  attend(step, layer, thread);
}

// What becomes of each token by itself: the projection of what it found, and the feed-forward
// network.
void Model::transform(const Step& step, int layer, int thread) {
  const LayerWeights& w = weights_.layers[layer];
  const Activations attended = quantize_attention(step, w.attention_output, thread);
  residual(thread, w.attention_output, attended, step, !w.attention_post_norm.empty());
  gate_up(step, layer, thread, norm_rows(step, w.mlp_norm, w.attention_post_norm, thread));
  const Activations gated = state_.gated.activations(state_.mlp, config_.intermediate_size);
  residual(thread, w.down, gated, step, !w.mlp_post_norm.empty());
}

// The same for the rows that are kept: they move to the front meanwhile, each to an earlier place.
void Model::transform_kept(const Step& step, int layer, int thread) {
  if (step.num_kept == 0) return;
  const int64_t D = config_.hidden_size, attended = config_.attention_size();
  for_units(thread, 1, [&](int) {
    for (int i = 0; i < step.num_kept; ++i) {
      const int64_t t = kept_rows_[i];
      std::copy_n(state_.hidden + t * D, D, state_.hidden + i * D);
      std::copy_n(state_.attention + t * attended, attended, state_.attention + i * attended);
    }
  });
  Step kept = step;
  kept.num_tokens = step.num_kept;
  transform(kept, layer, thread);
  for_units(thread, 1, [&](int) {
    for (int i = step.num_kept - 1; i >= 0; --i) {
      const int64_t t = kept_rows_[i];
      std::copy_n(state_.hidden + i * D, D, state_.hidden + t * D);
      std::copy_n(state_.branch + i * D, D, state_.branch + t * D);
    }
  });
}

}  // namespace fulcrum
