// Model's memory: the activations of a step, laid out when the batch's capacity is known, and the
// check of a step against what is bound.
#include <algorithm>
#include <stdexcept>

#include "model.h"

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

void lay_out(const Config& c, int64_t T, int num_threads, const LinearKernels& linear,
             Carver* memory, RunState* s) {
  const int64_t tables = c.rope_inv_freq.size();
  const int input_size = c.reads_hidden ? 2 * c.hidden_size : c.hidden_size;
  const int widest = std::max({input_size, c.attention_size(), c.intermediate_size});
  const auto take_operand = [&](Operand* operand, int64_t rows) {
    memory->take(&operand->normed, rows * input_size);
    memory->take(&operand->quantized, rows * padded_k(widest));
    if (linear.reads_widened) memory->take(&operand->widened, rows * padded_k(widest));
    memory->take(&operand->scales, rows * num_groups(widest));
    memory->take(&operand->sums, rows * num_groups(widest));
    memory->take(&operand->totals, rows * num_groups(widest));
    if (linear.reads_rounded) memory->take(&operand->rounded, rows * padded_k(widest));
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
  lay_out(config, max_tokens, num_threads, *linear, &sizes, &s);
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
  kept_rows_.reserve(limits.max_tokens);
  if (limits.max_tokens != limits_.max_tokens) state_ = make_state(limits.max_tokens);
  // Last: where memory ran out, the former buffers stay bound.
  batch_ = batch;
  limits_ = limits;
}

RunState Model::make_state(int max_tokens) const {
  RunState s;
  Carver sizes;
  lay_out(config_, max_tokens, num_threads(), *linear_, &sizes, &s);
  s.memory = Buffer(sizes.bytes);
  Carver places{s.memory.data()};
  lay_out(config_, max_tokens, num_threads(), *linear_, &places, &s);
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

}  // namespace fulcrum
