// A model that drafts for another one: it catches up with the texts, then proposes a chain of
// tokens for each, all in one call. The bindings own one Drafter beside its models; the thread that
// drives the target drives it too, between two steps.
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"

namespace fulcrum {

// What the texts are read from, owned by the caller and bound once: one lane for each text.
struct DraftTexts {
  const int32_t* tokens = nullptr;     // (lanes, max_length)
  const int32_t* blocks = nullptr;     // (lanes, M) blocks of the KV cache
  const float* temperature = nullptr;  // (lanes,) and so the rest
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const int32_t* top_k = nullptr;
  const uint64_t* seed = nullptr;
  int num_lanes = 0;
  int max_length = 0;
  int max_blocks = 0;  // M
  // The target's last hidden states, where the model reads them: that of position p in row p % W.
  const float* hidden = nullptr;  // (lanes * W, D)
  int hidden_window = 0;          // W
};

// What a call is asked for, and what it gives. B sequences, K drafts at most.
struct DraftCall {
  const int32_t* lanes = nullptr;  // (B,)
  // Positions [begin, end) of the text, not computed here yet: their keys and values are written.
  // A model that reads hidden states takes token p + 1 and the hidden state of p at position p.
  const int32_t* begin = nullptr;       // (B,)
  const int32_t* end = nullptr;         // (B,)
  const int32_t* start = nullptr;       // (B,) a multiple of kBlockSize: what lies before is unseen
  const int32_t* num_drafts = nullptr;  // (B,) wanted, 0: only catch up
  int32_t* draft_ids = nullptr;         // (B, K)
  float* draft_probs = nullptr;         // (B, K) of the draft itself, before temperature
  int32_t* num_drafted = nullptr;       // (B,)
};

class Drafter {
 public:
  // `model` outlives this. K drafts at most; the catch-up is computed max_tokens at a time.
  Drafter(Model& model, int max_tokens, int max_sequences, int max_drafts);

  void bind(const DraftTexts& texts, const DraftCall& call);

  // A chain ends where the product of its probabilities falls below min_confidence, that draft
  // included. Throws std::invalid_argument where the call would read outside of what is bound.
  void propose(int num_sequences, float min_confidence);

 private:
  void check(int num_sequences) const;
  void catch_up(int num_sequences);
  void begin_step();
  bool is_full() const { return num_tokens_ == max_tokens_; }
  void add_token(int sequence, int position, int32_t token_id, int previous_row);
  void end_sequence(int sequence, int seq_len, int noise_position, bool wants_draft);
  void compute();
  int text_length(int sequence) const;

  Model& model_;
  const int max_tokens_, max_sequences_, max_drafts_;
  DraftTexts texts_;
  DraftCall call_;
  // The step being laid out, in the buffers that batch_ points to.
  int num_tokens_ = 0, num_sequences_ = 0, num_rows_ = 0;
  std::vector<int32_t> token_ids_, positions_, slots_, previous_rows_;  // (T,)
  std::vector<int32_t> query_start_, seq_lens_, block_table_;           // (S + 1,), (S,), (S, M)
  std::vector<int32_t> logits_rows_, row_sequence_;                     // (S,) and so the rest
  std::vector<int32_t> noise_position_, top_k_, minus_ones_, zeros_;
  std::vector<float> temperature_, top_p_, min_p_, ones_, float_zeros_;
  std::vector<uint64_t> seed_;
  std::vector<int32_t> sampled_ids_, top_ids_;
  std::vector<float> sampled_logprobs_, top_logprobs_;
  // What a model that goes on from its normed output left of each chain, and where a step puts it.
  std::vector<float> normed_;         // (S, D), empty for other models
  std::vector<int32_t> hidden_rows_;  // (T,)
  // Of each sequence's chain: the row that its last draft was taken from, and its confidence.
  std::vector<int32_t> last_row_;
  std::vector<float> confidence_;
};

}  // namespace fulcrum
