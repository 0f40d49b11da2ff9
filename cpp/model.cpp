// Model's computing half: the forward pass. Every thread of the pool runs run_thread from top to
// bottom; each operation ends with a barrier, so that the next sees all of its results.
#include "model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fulcrum {
namespace {

// Units that a thread takes at once: an eighth of its share, so that the last ones even out.
int units_at_once(int num_units, int num_threads) {
  return std::max(1, num_units / (num_threads * 8));
}

bool needs_integers(const Matrix& w) { return w.packed.format != Format::kBf16; }

}  // namespace

void Model::bind(const Batch& batch, const Limits& limits) {
  const Config& c = config_;
  batch_ = batch;
  const bool grows = limits.max_tokens != limits_.max_tokens;
  limits_ = limits;
  if (!grows) return;
  const int64_t T = limits.max_tokens;
  const int64_t tables = c.rope_inv_freq.size();
  const int widest = std::max({c.hidden_size, c.attention_size(), c.intermediate_size});
  RunState s;
  int64_t bytes = 0;
  const auto reserve = [&bytes](int64_t count, size_t size) {
    const int64_t offset = bytes;
    bytes += (count * static_cast<int64_t>(size) + 63) / 64 * 64;
    return offset;
  };
  const int64_t hidden = reserve(T * c.hidden_size, sizeof(float));
  const int64_t normed = reserve(T * c.hidden_size, sizeof(float));
  const int64_t branch = reserve(T * c.hidden_size, sizeof(float));
  const int64_t qkv = reserve(T * c.qkv_size(), sizeof(float));
  const int64_t attention = reserve(T * c.attention_size(), sizeof(float));
  const int64_t mlp = reserve(T * 2 * c.intermediate_size, sizeof(float));
  const int64_t cos = reserve(tables * T * c.head_dim / 2, sizeof(float));
  const int64_t sin = reserve(tables * T * c.head_dim / 2, sizeof(float));
  const int64_t quantized = reserve(T * padded_k(widest), 1);
  const int64_t scales = reserve(T * num_groups(widest), sizeof(float));
  const int64_t sums = reserve(T * num_groups(widest), sizeof(float));
  const int64_t logits = reserve(int64_t{kLogitsChunk} * c.vocab_size, sizeof(float));
  s.memory = Buffer(bytes);
  uint8_t* base = s.memory.data();
  const auto at = [base](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  s.hidden = at(hidden);
  s.normed = at(normed);
  s.branch = at(branch);
  s.qkv = at(qkv);
  s.attention = at(attention);
  s.mlp = at(mlp);
  s.cos = at(cos);
  s.sin = at(sin);
  s.quantized = reinterpret_cast<int8_t*>(base + quantized);
  s.scales = at(scales);
  s.sums = at(sums);
  s.logits = at(logits);
  for (int thread = 0; thread < num_threads(); ++thread) {
    s.attention_scratch.emplace_back(attention_scratch_floats(c.head_dim) * sizeof(float));
    s.sampler_scratch.emplace_back(c.vocab_size);
  }
  state_ = std::move(s);
  tiles_.reserve(T);
}

void Model::check(const Step& step) const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  };
  const Batch& b = batch_;
  require(kv_.num_blocks > 0 && b.token_ids != nullptr, "step before allocate_kv and bind");
  require(step.num_tokens >= 0 && step.num_tokens <= limits_.max_tokens, "num_tokens");
  require(step.num_sequences >= 0 && step.num_sequences <= limits_.max_sequences, "num_sequences");
  require(step.num_rows >= 0 && step.num_rows <= limits_.max_rows, "num_rows");
  const int64_t num_slots = int64_t{kv_.num_blocks} * kBlockSize;
  for (int t = 0; t < step.num_tokens; ++t) {
    require(b.token_ids[t] >= 0 && b.token_ids[t] < config_.vocab_size, "token id out of range");
    require(b.slot_mapping[t] >= 0 && b.slot_mapping[t] < num_slots, "slot out of range");
  }
  require(b.query_start[0] == 0 && b.query_start[step.num_sequences] == step.num_tokens,
          "query_start does not cover the tokens");
  for (int s = 0; s < step.num_sequences; ++s) {
    const int num_queries = b.query_start[s + 1] - b.query_start[s];
    require(num_queries > 0 && b.seq_lens[s] >= num_queries, "query_start or seq_lens");
    require(b.positions[b.query_start[s]] == b.seq_lens[s] - num_queries, "positions or seq_lens");
    const int num_blocks = (b.seq_lens[s] + kBlockSize - 1) / kBlockSize;
    require(num_blocks <= limits_.max_blocks_per_seq, "sequence longer than its block table");
    const int32_t* table = b.block_table + int64_t{s} * limits_.max_blocks_per_seq;
    for (int i = 0; i < num_blocks; ++i) {
      require(table[i] >= 0 && table[i] < kv_.num_blocks, "block out of range");
    }
  }
  for (int r = 0; r < step.num_rows; ++r) {
    const int after = r == 0 ? 0 : b.logits_rows[r - 1] + 1;
    require(b.logits_rows[r] >= after && b.logits_rows[r] < step.num_tokens,
            "logits rows must ascend within the step");
    require(0 <= b.history_start[r] && b.history_start[r] <= b.history_output_start[r] &&
                b.history_output_start[r] <= b.history_end[r] &&
                b.history_end[r] <= limits_.history_ids,
            "history out of range");
    require(0 <= b.bias_start[r] && b.bias_start[r] <= b.bias_start[r + 1] &&
                b.bias_start[r + 1] <= limits_.bias_ids,
            "bias out of range");
    require(b.num_logprobs[r] <= kMaxLogprobs, "num_logprobs out of range");
  }
  require(b.logits == nullptr || step.num_rows <= limits_.logits_rows, "logits buffer too small");
}

void Model::plan_tiles(const Step& step) {
  const int group = config_.num_heads / config_.num_kv_heads;
  const int most = std::clamp(kMaxTileRows / group, 1, kMaxTileTokens);
  tiles_.clear();
  for (int s = 0; s < step.num_sequences; ++s) {
    for (int t = batch_.query_start[s]; t < batch_.query_start[s + 1]; t += most) {
      tiles_.push_back({s, t, std::min(most, batch_.query_start[s + 1] - t)});
    }
  }
}

void Model::step(int num_tokens, int num_sequences, int num_rows) {
  const Step step{num_tokens, num_sequences, num_rows};
  check(step);
  if (num_tokens == 0) return;
  plan_tiles(step);
  pool_.run([this, &step](int thread) { run_thread(step, thread); });
}

void Model::run_thread(const Step& step, int thread) {
  embed(step);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    mix(step, layer, thread);
    transform(step, layer);
  }
  sample(step, thread);
}

// Calls op(row) for every row, the rows shared among the threads; ends with a barrier.
template <typename Op>
void Model::for_rows(int num_rows, Op op) {
  const int count = units_at_once(num_rows, num_threads());
  int begin, end;
  while (pool_.take(num_rows, count, &begin, &end)) {
    for (int row = begin; row < end; ++row) op(row);
  }
  pool_.barrier();
}

Activations Model::activations(const float* values, int64_t ld) const {
  return {values, ld, state_.quantized, state_.scales, state_.sums};
}

// y[:, parts side by side] = x @ part^T; ends with a barrier.
void Model::multiply(std::initializer_list<const Matrix*> parts, const Activations& x, int num_rows,
                     float* y, int64_t ld_y, bool accumulate) {
  const auto tiles_of = [this](const Matrix* part) {
    const int channels = linear_->tile_channels(part->packed.format);
    return (part->packed.N + channels - 1) / channels;
  };
  int num_tiles = 0;
  for (const Matrix* part : parts) num_tiles += tiles_of(part);
  const int count = units_at_once(num_tiles, num_threads());
  int begin, end;
  while (pool_.take(num_tiles, count, &begin, &end)) {
    int first_tile = 0;
    int64_t channel = 0;
    for (const Matrix* part : parts) {
      const int tiles = tiles_of(part);
      const int low = std::max(begin - first_tile, 0), high = std::min(end - first_tile, tiles);
      if (low < high) {
        linear_->gemm(part->packed, x, num_rows, y + channel, ld_y, low, high, accumulate);
      }
      first_tile += tiles;
      channel += part->packed.N;
    }
  }
  pool_.barrier();
}

void Model::embed(const Step& step) {
  const Config& c = config_;
  const int half = c.head_dim / 2;
  const int64_t table_size = int64_t{limits_.max_tokens} * half;
  for_rows(step.num_tokens, [&](int t) {
    float* row = state_.hidden + int64_t{t} * c.hidden_size;
    linear_->unpack_row(weights_.embedding.packed, batch_.token_ids[t], row);
    if (c.embedding_scale != 1) vector_->scale(row, c.embedding_scale, c.hidden_size);
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
  });
}

// Adds the former branch where it waits for its post norm; normed = norm(hidden), quantized.
void Model::norm_rows(const Step& step, const FloatVector& weight, const FloatVector& post_norm) {
  const int D = config_.hidden_size;
  for_rows(step.num_tokens, [&](int t) {
    float* hidden = state_.hidden + int64_t{t} * D;
    float* normed = state_.normed + int64_t{t} * D;
    if (!post_norm.empty()) {
      float* branch = state_.branch + int64_t{t} * D;
      vector_->rms_norm(branch, post_norm.data(), config_.norm_eps, D, branch);
      vector_->add(hidden, branch, D);
    }
    vector_->rms_norm(hidden, weight.data(), config_.norm_eps, D, normed);
    linear_->quantize_rows(activations(state_.normed, D), D, t, t + 1);
  });
}

// Ends a branch: onto the residual stream, or beside it where a post norm comes first.
void Model::residual(const Matrix& w, const Activations& x, const Step& step, bool has_post_norm) {
  float* y = has_post_norm ? state_.branch : state_.hidden;
  multiply({&w}, x, step.num_tokens, y, config_.hidden_size, !has_post_norm);
}

// Attention: how the tokens of a sequence mix.
void Model::mix(const Step& step, int layer, int thread) {
  const Config& c = config_;
  const LayerWeights& w = weights_.layers[layer];
  static const FloatVector kNone;
  norm_rows(step, w.attention_norm, layer > 0 ? weights_.layers[layer - 1].mlp_post_norm : kNone);
  multiply({&w.q, &w.k, &w.v}, activations(state_.normed, c.hidden_size), step.num_tokens,
           state_.qkv, c.qkv_size(), false);
  rotate_and_cache(step, layer);
  attend(layer, thread);
  const Activations attended = activations(state_.attention, c.attention_size());
  if (needs_integers(w.attention_output)) {
    for_rows(step.num_tokens,
             [&](int t) { linear_->quantize_rows(attended, c.attention_size(), t, t + 1); });
  }
  residual(w.attention_output, attended, step, !w.attention_post_norm.empty());
}

// The feed-forward network: what becomes of each token by itself.
void Model::transform(const Step& step, int layer) {
  const Config& c = config_;
  const LayerWeights& w = weights_.layers[layer];
  norm_rows(step, w.mlp_norm, w.attention_post_norm);
  const int64_t ld = 2 * int64_t{c.intermediate_size};
  multiply({&w.gate, &w.up}, activations(state_.normed, c.hidden_size), step.num_tokens, state_.mlp,
           ld, false);
  const Activations gated = activations(state_.mlp, ld);
  for_rows(step.num_tokens, [&](int t) {
    float* row = state_.mlp + t * ld;
    vector_->gate(c.activation, row, row + c.intermediate_size, c.intermediate_size, row);
    if (needs_integers(w.down)) linear_->quantize_rows(gated, c.intermediate_size, t, t + 1);
  });
  residual(w.down, gated, step, !w.mlp_post_norm.empty());
}

void Model::rotate_and_cache(const Step& step, int layer) {
  const Config& c = config_;
  const LayerWeights& w = weights_.layers[layer];
  const int HD = c.head_dim, half = HD / 2;
  const int64_t table = c.layer_rope_index[layer] * int64_t{limits_.max_tokens} * half;
  for_rows(step.num_tokens, [&](int t) {
    float* q = state_.qkv + int64_t{t} * c.qkv_size();
    float* k = q + c.attention_size();
    float* v = k + c.num_kv_heads * HD;
    if (!w.q_bias.empty()) vector_->add(q, w.q_bias.data(), c.attention_size());
    if (!w.k_bias.empty()) vector_->add(k, w.k_bias.data(), c.num_kv_heads * HD);
    if (!w.v_bias.empty()) vector_->add(v, w.v_bias.data(), c.num_kv_heads * HD);
    const float* cos = state_.cos + table + int64_t{t} * half;
    const float* sin = state_.sin + table + int64_t{t} * half;
    for (int head = 0; head < c.num_heads + c.num_kv_heads; ++head) {
      float* values = q + head * HD;  // the keys follow the queries
      const FloatVector& norm = head < c.num_heads ? w.q_norm : w.k_norm;
      if (!norm.empty()) vector_->rms_norm(values, norm.data(), c.norm_eps, HD, values);
      vector_->rotate(values, cos, sin, HD);
    }
    vector_->scale(q, c.attention_scale, c.attention_size());
    const int64_t slot = batch_.slot_mapping[t];
    const int64_t block = slot / kBlockSize * kv_.block_stride();
    for (int head = 0; head < c.num_kv_heads; ++head) {
      write_kv(k + head * HD, v + head * HD, HD, static_cast<int>(slot % kBlockSize),
               kv_.keys(layer, head) + block, kv_.values(layer, head) + block);
    }
  });
}

void Model::attend(int layer, int thread) {
  const Config& c = config_;
  const int group = c.num_heads / c.num_kv_heads;
  const int num_units = static_cast<int>(tiles_.size()) * c.num_kv_heads;
  int begin, end;
  while (pool_.take(num_units, 1, &begin, &end)) {
    const Tile& tile = tiles_[begin / c.num_kv_heads];
    const int kv_head = begin % c.num_kv_heads;
    const int64_t channel = int64_t{kv_head} * group * c.head_dim;
    AttentionUnit unit;
    unit.queries = state_.qkv + int64_t{tile.first_token} * c.qkv_size() + channel;
    unit.out = state_.attention + int64_t{tile.first_token} * c.attention_size() + channel;
    unit.ld_queries = c.qkv_size();
    unit.ld_out = c.attention_size();
    unit.num_tokens = tile.num_tokens;
    unit.num_heads = group;
    unit.head_dim = c.head_dim;
    unit.first_position = batch_.positions[tile.first_token];
    unit.window = c.layer_windows[layer];
    unit.block_table = batch_.block_table + int64_t{tile.sequence} * limits_.max_blocks_per_seq;
    unit.keys = kv_.keys(layer, kv_head);
    unit.values = kv_.values(layer, kv_head);
    unit.block_stride = kv_.block_stride();
    vector_->attend(unit, state_.attention_scratch[thread].as<float>());
  }
  pool_.barrier();
}

// Logits of the rows that need them, a chunk at a time, and their samples.
void Model::sample(const Step& step, int thread) {
  const Config& c = config_;
  const int D = c.hidden_size, V = c.vocab_size;
  const Matrix& head = weights_.output.loaded() ? weights_.output : weights_.embedding;
  const FloatVector& post_norm = weights_.layers.back().mlp_post_norm;
  for (int first = 0; first < step.num_rows; first += kLogitsChunk) {
    const int num_rows = std::min(kLogitsChunk, step.num_rows - first);
    for_rows(num_rows, [&](int i) {
      const int64_t t = batch_.logits_rows[first + i];
      float* hidden = state_.hidden + t * D;
      if (!post_norm.empty()) {
        float* branch = state_.branch + t * D;
        vector_->rms_norm(branch, post_norm.data(), c.norm_eps, D, branch);
        vector_->add(hidden, branch, D);
      }
      vector_->rms_norm(hidden, weights_.final_norm.data(), c.norm_eps, D,
                        state_.normed + int64_t{i} * D);
      linear_->quantize_rows(activations(state_.normed, D), D, i, i + 1);
    });
    multiply({&head}, activations(state_.normed, D), num_rows, state_.logits, V, false);
    int begin, end;
    while (pool_.take(num_rows, 1, &begin, &end)) {
      sample_one(first + begin, state_.logits + int64_t{begin} * V, thread);
    }
    pool_.barrier();
  }
}

void Model::sample_one(int row, float* logits, int thread) {
  const Batch& b = batch_;
  const int V = config_.vocab_size;
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
  p.history_ids = b.history_ids + b.history_start[row];
  p.history_size = b.history_end[row] - b.history_start[row];
  p.output_start = b.history_output_start[row] - b.history_start[row];
  p.bias_ids = b.bias_ids + b.bias_start[row];
  p.bias_values = b.bias_values + b.bias_start[row];
  p.bias_size = b.bias_start[row + 1] - b.bias_start[row];
  RowResult result;
  sample_row(p, logits, V, state_.sampler_scratch[thread], &result);
  b.sampled_ids[row] = result.error == RowError::kNone ? result.id : -1;
  b.sampled_logprobs[row] = result.logprob;
  for (int i = 0; i < result.num_top; ++i) {
    b.top_ids[int64_t{row} * kMaxLogprobs + i] = result.top_ids[i];
    b.top_logprobs[int64_t{row} * kMaxLogprobs + i] = result.top_logprobs[i];
  }
}

}  // namespace fulcrum
