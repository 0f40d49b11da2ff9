// Model's computing half: the forward pass. Every thread of the pool runs run_thread from top to
// bottom; an operation begins when all units of the one before are computed.
#include "model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fulcrum {
namespace {

// Hands out consecutive, 64-byte aligned parts of a memory; without one, counts the bytes.
struct Carver {
  uint8_t* base = nullptr;
  int64_t bytes = 0;

  template <typename Value>
  void take(Value** pointer, int64_t count) {
    if (base != nullptr) *pointer = reinterpret_cast<Value*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(Value)) + 63) / 64 * 64;
  }
};

void lay_out(const Config& c, int64_t T, int num_threads, bool widens, Carver* memory,
             RunState* s) {
  const int64_t tables = c.rope_inv_freq.size();
  const int input_size = c.reads_hidden ? 2 * c.hidden_size : c.hidden_size;
  const int widest = std::max({input_size, c.attention_size(), c.intermediate_size});
  const auto take_operand = [&](Operand* operand, int64_t rows) {
    memory->take(&operand->normed, rows * input_size);
    memory->take(&operand->quantized, rows * padded_k(widest));
    if (widens) memory->take(&operand->widened, rows * padded_k(widest));
    memory->take(&operand->scales, rows * num_groups(widest));
    memory->take(&operand->sums, rows * num_groups(widest));
    memory->take(&operand->totals, rows * num_groups(widest));
  };
  s->own.resize(num_threads);
  for (Operand& operand : s->own) take_operand(&operand, kReplicatedRows);
  take_operand(&s->shared, T);
  take_operand(&s->gated, T);
  memory->take(&s->hidden, T * c.hidden_size);
  memory->take(&s->branch, T * c.hidden_size);
  memory->take(&s->qkv, T * c.qkv_size());
  memory->take(&s->attention, T * c.attention_size());
  memory->take(&s->mlp, T * c.intermediate_size);
  s->gate_up.resize(num_threads);
  for (float*& own : s->gate_up) memory->take(&own, gate_up_floats(c));
  memory->take(&s->cos, tables * T * c.head_dim / 2);
  memory->take(&s->sin, tables * T * c.head_dim / 2);
  memory->take(&s->logits, int64_t{kLogitsChunk} * c.vocab_size);
}

int64_t max_attention_parts(int num_threads, int max_blocks_per_seq) {
  const int num_segments = attention_segments(0, max_blocks_per_seq * kBlockSize, 0).end;
  return int64_t{kMaxPartedUnits} * num_threads * num_segments;
}

int64_t attention_parts_bytes(int64_t num_parts, int head_dim) {
  return num_parts * attention_state_floats(kMaxPartRows, head_dim) * sizeof(float);
}

}  // namespace

int64_t Model::activation_bytes(const Config& config, const std::string& isa, int num_threads,
                                int max_tokens, int max_blocks_per_seq) {
  const LinearKernels* linear = linear_kernels(isa.c_str());
  if (linear == nullptr) throw std::invalid_argument("unknown instruction set " + isa);
  RunState s;
  Carver sizes;
  lay_out(config, max_tokens, num_threads, linear->reads_widened, &sizes, &s);
  const int64_t scratch = attention_scratch_floats(config.head_dim) * sizeof(float) +
                          SamplerScratch(config.vocab_size).bytes();
  const int64_t num_parts = max_attention_parts(num_threads, max_blocks_per_seq);
  return sizes.bytes + num_threads * scratch + attention_parts_bytes(num_parts, config.head_dim);
}

int64_t Model::activation_bytes() const {
  int64_t bytes = state_.memory.bytes() + attention_states_.bytes();
  for (const Buffer& scratch : state_.attention_scratch) bytes += scratch.bytes();
  for (const SamplerScratch& scratch : state_.sampler_scratch) bytes += scratch.bytes();
  return bytes;
}

void Model::bind(const Batch& batch, const Limits& limits) {
  pool_->wait_until_idle();
  const int64_t num_parts = max_attention_parts(num_threads(), limits.max_blocks_per_seq);
  const int64_t bytes = attention_parts_bytes(num_parts, config_.head_dim);
  if (bytes > static_cast<int64_t>(attention_states_.bytes())) attention_states_ = Buffer(bytes);
  parts_.reserve(num_parts);
  tiles_.reserve(limits.max_tokens);
  if (limits.max_tokens != limits_.max_tokens) state_ = make_state(limits.max_tokens);
  // Last: where memory ran out, the former buffers stay bound.
  batch_ = batch;
  limits_ = limits;
}

RunState Model::make_state(int max_tokens) const {
  RunState s;
  Carver sizes;
  lay_out(config_, max_tokens, num_threads(), linear_->reads_widened, &sizes, &s);
  s.memory = Buffer(sizes.bytes);
  Carver places{s.memory.data()};
  lay_out(config_, max_tokens, num_threads(), linear_->reads_widened, &places, &s);
  for (int thread = 0; thread < num_threads(); ++thread) {
    s.attention_scratch.emplace_back(attention_scratch_floats(config_.head_dim) * sizeof(float));
    s.sampler_scratch.emplace_back(config_.vocab_size);
  }
  return s;
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
    require(b.hidden == nullptr || b.hidden_rows[t] < limits_.hidden_rows, "hidden row");
  }
  require(b.query_start[0] == 0 && b.query_start[step.num_sequences] == step.num_tokens,
          "query_start does not cover the tokens");
  for (int s = 0; s < step.num_sequences; ++s) {
    const int num_queries = b.query_start[s + 1] - b.query_start[s];
    require(num_queries > 0 && b.seq_lens[s] >= num_queries, "query_start or seq_lens");
    for (int t = b.query_start[s]; t < b.query_start[s + 1]; ++t) {
      require(b.positions[t] == b.seq_lens[s] - (b.query_start[s + 1] - t),
              "positions or seq_lens");
    }
    const int64_t num_blocks = (int64_t{b.seq_lens[s]} + kBlockSize - 1) / kBlockSize;
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
  require(!config_.reads_hidden || b.previous_hidden != nullptr, "no hidden states to read");
  require(b.logits == nullptr || step.num_rows <= limits_.logits_rows, "logits buffer too small");
}

void Model::step(int num_tokens, int num_sequences, int num_rows) {
  Step step{num_tokens, num_sequences, num_rows, 0, 0};
  check(step);
  if (num_tokens == 0) return;
  plan_tiles(&step);
  plan_parts(&step);
  pool_->run(*this, {num_tokens, num_sequences, num_rows, step.num_tiles, step.num_parts});
}

void Model::run_thread(int thread, const ThreadPool::Arguments& sizes) {
  const Step step{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  embed(step, thread);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    mix(step, layer, thread);
    transform(step, layer, thread);
  }
  sample(step, thread);
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

// Attention: how the tokens of a sequence mix.
void Model::mix(const Step& step, int layer, int thread) {
  const Config& c = config_;
  const LayerWeights& w = weights_.layers[layer];
  static const FloatVector kNone;
  const Activations normed = norm_rows(
      step, w.attention_norm, layer > 0 ? weights_.layers[layer - 1].mlp_post_norm : kNone, thread);
  multiply(thread, {&w.q, &w.k, &w.v}, normed, step.num_tokens, state_.qkv, c.qkv_size(), false);
  rotate_and_cache(step, layer, thread);
  attend(step, layer, thread);
  const Activations attended = quantize_attention(step, w.attention_output, thread);
  residual(thread, w.attention_output, attended, step, !w.attention_post_norm.empty());
}

// The feed-forward network: what becomes of each token by itself.
void Model::transform(const Step& step, int layer, int thread) {
  const LayerWeights& w = weights_.layers[layer];
  gate_up(step, layer, thread, norm_rows(step, w.mlp_norm, w.attention_post_norm, thread));
  const Activations gated = state_.gated.activations(state_.mlp, config_.intermediate_size);
  residual(thread, w.down, gated, step, !w.mlp_post_norm.empty());
}

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
