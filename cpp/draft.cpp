#include "draft.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fulcrum {

Drafter::Drafter(Model& model, int max_tokens, int max_sequences, int max_drafts)
    : model_(model),
      max_tokens_(std::max(max_tokens, max_sequences)),
      max_sequences_(max_sequences),
      max_drafts_(max_drafts),
      token_ids_(max_tokens_),
      positions_(max_tokens_),
      slots_(max_tokens_),
      previous_rows_(max_tokens_),
      query_start_(max_sequences + 1),
      seq_lens_(max_sequences),
      logits_rows_(max_sequences),
      row_sequence_(max_sequences),
      noise_position_(max_sequences),
      top_k_(max_sequences),
      minus_ones_(max_sequences, -1),
      zeros_(max_sequences + 1),
      temperature_(max_sequences),
      top_p_(max_sequences),
      min_p_(max_sequences),
      ones_(max_sequences, 1.0f),
      float_zeros_(max_sequences),
      seed_(max_sequences),
      sampled_ids_(max_sequences),
      top_ids_(max_sequences * kMaxLogprobs),
      sampled_logprobs_(max_sequences),
      top_logprobs_(max_sequences * kMaxLogprobs),
      hidden_rows_(model.config().chains_normed ? max_tokens_ : 0, -1),
      last_row_(max_sequences),
      confidence_(max_sequences) {
  if (model.config().chains_normed) {
    normed_.resize(size_t(max_sequences) * model.config().hidden_size);
  }
  if (max_sequences < 1 || max_drafts < 1) throw std::invalid_argument("nothing to draft for");
}

void Drafter::bind(const DraftTexts& texts, const DraftCall& call) {
  if (model_.config().reads_hidden && texts.hidden == nullptr) {
    throw std::invalid_argument("the drafter reads hidden states, and none are bound");
  }
  block_table_.assign(size_t(max_sequences_) * texts.max_blocks, 0);
  Batch b;
  b.token_ids = token_ids_.data();
  b.positions = positions_.data();
  b.slot_mapping = slots_.data();
  b.previous_hidden = texts.hidden;
  b.previous_rows = previous_rows_.data();
  b.query_start = query_start_.data();
  b.seq_lens = seq_lens_.data();
  b.block_table = block_table_.data();
  b.logits_rows = logits_rows_.data();
  b.target_ids = minus_ones_.data();
  b.temperature = temperature_.data();
  b.top_p = top_p_.data();
  b.min_p = min_p_.data();
  b.repetition_penalty = ones_.data();
  b.presence_penalty = b.frequency_penalty = float_zeros_.data();
  b.top_k = top_k_.data();
  b.num_logprobs = zeros_.data();  // the draft's own probability
  b.seed = seed_.data();
  b.noise_position = noise_position_.data();
  b.history_start = b.history_output_start = b.history_end = zeros_.data();
  b.bias_start = b.history_ids = b.bias_ids = zeros_.data();
  b.bias_values = float_zeros_.data();
  b.sampled_ids = sampled_ids_.data();
  b.sampled_logprobs = sampled_logprobs_.data();
  b.top_ids = top_ids_.data();
  b.top_logprobs = top_logprobs_.data();
  Limits limits;
  if (!normed_.empty()) {
    b.hidden = normed_.data();
    b.hidden_rows = hidden_rows_.data();
    limits.hidden_rows = max_sequences_;
  }
  limits.max_tokens = max_tokens_;
  limits.max_sequences = limits.max_rows = max_sequences_;
  limits.max_blocks_per_seq = texts.max_blocks;
  model_.bind(b, limits);
  texts_ = texts;
  call_ = call;
}

void Drafter::check(int num_sequences) const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  };
  require(texts_.tokens != nullptr, "propose before bind");
  require(num_sequences >= 0 && num_sequences <= max_sequences_, "num_sequences");
  int64_t num_tokens = 0;
  for (int s = 0; s < num_sequences; ++s) {
    require(call_.lanes[s] >= 0 && call_.lanes[s] < texts_.num_lanes, "lane out of range");
    require(call_.start[s] >= 0 && call_.start[s] % kBlockSize == 0, "start");
    require(call_.start[s] <= call_.begin[s] && call_.begin[s] < call_.end[s], "begin or end");
    require(call_.num_drafts[s] >= 0 && call_.num_drafts[s] <= max_drafts_, "num_drafts");
    require(text_length(s) + call_.num_drafts[s] <= texts_.max_length, "too long a text");
    require(text_length(s) + call_.num_drafts[s] - 1 <= int64_t{texts_.max_blocks} * kBlockSize,
            "too few blocks");
    num_tokens += call_.end[s] - call_.begin[s];
    require(!model_.config().reads_hidden || call_.end[s] - call_.begin[s] <= texts_.hidden_window,
            "hidden states that are gone");
  }
  // Its own hidden states live for one step.
  require(!model_.config().reads_hidden || num_tokens <= max_tokens_, "too many tokens");
}

// Tokens of the text that are known, the drafts that follow excluded.
int Drafter::text_length(int sequence) const {
  return call_.end[sequence] + (model_.config().reads_hidden ? 1 : 0);
}

void Drafter::propose(int num_sequences, float min_confidence) {
  check(num_sequences);
  std::fill_n(call_.num_drafted, num_sequences, 0);
  std::fill_n(confidence_.begin(), num_sequences, 1.0f);
  catch_up(num_sequences);
  for (int depth = 1; depth < max_drafts_; ++depth) {
    begin_step();
    for (int s = 0; s < num_sequences; ++s) {
      if (call_.num_drafts[s] <= depth || call_.num_drafted[s] < depth) continue;
      if (confidence_[s] < min_confidence) continue;
      const int32_t id = call_.draft_ids[int64_t{s} * max_drafts_ + depth - 1];
      const int position = call_.end[s] - 1 + depth;
      add_token(s, position, id, last_row_[s]);
      end_sequence(s, position + 1 - call_.start[s], text_length(s) + depth, true);
    }
    if (num_tokens_ == 0) break;
    compute();
  }
}

void Drafter::catch_up(int num_sequences) {
  const bool reads_hidden = model_.config().reads_hidden;
  model_.set_previous_hidden(texts_.hidden);
  begin_step();
  for (int s = 0; s < num_sequences; ++s) {
    const int32_t* tokens = texts_.tokens + int64_t{call_.lanes[s]} * texts_.max_length;
    for (int p = call_.begin[s]; p < call_.end[s]; ++p) {
      add_token(
          s, p, tokens[reads_hidden ? p + 1 : p],
          reads_hidden ? call_.lanes[s] * texts_.hidden_window + p % texts_.hidden_window : 0);
      const bool is_last = p + 1 == call_.end[s];
      if (!is_last && !is_full()) continue;
      end_sequence(s, p + 1 - call_.start[s], text_length(s), is_last && call_.num_drafts[s] > 0);
      if (!is_full()) continue;
      compute();
      begin_step();
    }
  }
  if (num_tokens_ > 0) compute();
  model_.set_previous_hidden(normed_.empty() ? model_.residual_stream() : normed_.data());
}

void Drafter::begin_step() { num_tokens_ = num_sequences_ = num_rows_ = 0; }

void Drafter::add_token(int sequence, int position, int32_t token_id, int previous_row) {
  const int t = num_tokens_++;
  const int32_t* blocks = texts_.blocks + int64_t{call_.lanes[sequence]} * texts_.max_blocks;
  token_ids_[t] = token_id;
  positions_[t] = position - call_.start[sequence];
  slots_[t] = blocks[position / kBlockSize] * kBlockSize + position % kBlockSize;
  previous_rows_[t] = previous_row;
  if (!normed_.empty()) hidden_rows_[t] = -1;
}

void Drafter::end_sequence(int sequence, int seq_len, int noise_position, bool wants_draft) {
  const int lane = call_.lanes[sequence];
  const int first_block = call_.start[sequence] / kBlockSize;
  const int32_t* blocks = texts_.blocks + int64_t{lane} * texts_.max_blocks + first_block;
  const int num_blocks = (seq_len + kBlockSize - 1) / kBlockSize;
  std::copy_n(blocks, num_blocks,
              block_table_.data() + int64_t{num_sequences_} * texts_.max_blocks);
  seq_lens_[num_sequences_++] = seq_len;
  query_start_[num_sequences_] = num_tokens_;
  if (!wants_draft) return;
  const int row = num_rows_++;
  logits_rows_[row] = num_tokens_ - 1;
  if (!normed_.empty()) hidden_rows_[num_tokens_ - 1] = row;
  row_sequence_[row] = sequence;
  noise_position_[row] = noise_position;
  temperature_[row] = texts_.temperature[lane];
  top_p_[row] = texts_.top_p[lane];
  min_p_[row] = texts_.min_p[lane];
  top_k_[row] = texts_.top_k[lane];
  seed_[row] = texts_.seed[lane];
}

// Computes the step that is laid out and appends its samples to their chains.
void Drafter::compute() {
  model_.step(num_tokens_, num_sequences_, num_rows_);
  for (int row = 0; row < num_rows_; ++row) {
    const int s = row_sequence_[row];
    if (sampled_ids_[row] < 0) continue;  // no usable logits: the chain ends here
    const int64_t place = int64_t{s} * max_drafts_ + call_.num_drafted[s]++;
    call_.draft_ids[place] = sampled_ids_[row];
    call_.draft_probs[place] = std::exp(sampled_logprobs_[row]);
    confidence_[s] *= call_.draft_probs[place];
    // A row is read when the next step begins, before that step writes any.
    last_row_[s] = normed_.empty() ? logits_rows_[row] : row;
  }
}

}  // namespace fulcrum
