// Prompt lookup: drafts are what followed the longest earlier occurrence of a text's last tokens
// (Saxena, Prompt Lookup Decoding, 2023). Each lane of the engine's token table has an index that
// grows with its text, so that a step costs no scan of it. bindings_ngram.cpp calls it.
#pragma once

#include <cstdint>
#include <vector>

namespace fulcrum {

// Positions by a hash of the n tokens that end there, newest first: a head for each hash and a
// link from each position to the one before it. Hashes collide; the caller compares the tokens.
class NgramChains {
 public:
  explicit NgramChains(int num_tokens) : num_tokens_(num_tokens) {}

  // Adds the positions up to (not including) `end`; text[0] … text[end - 1] must be valid.
  void extend(const int32_t* text, int32_t end);
  void clear();
  // The newest position whose tokens may be the n that end at `last`; -1: none.
  int32_t newest(const int32_t* text, int32_t last) const;
  int32_t older(int32_t position) const { return previous_[position]; }
  int64_t num_bytes() const;

 private:
  uint32_t slot(const int32_t* text, int32_t last) const;
  void rebuild(const int32_t* text, int32_t end);

  int num_tokens_;
  int shift_ = 32;                 // a hash's upper bits are its slot
  std::vector<int32_t> heads_;     // (power of two of at least 2 * positions)
  std::vector<int32_t> previous_;  // (positions indexed)
};

struct NgramDraft {
  int32_t num_drafts;
  int32_t match_length;  // tokens before the draft that stand before its source too; 0: no draft
};

class NgramIndex {
 public:
  // Matches longer than max_match count as max_match: the newest of them wins.
  NgramIndex(int num_lanes, int max_match, int min_match);

  // Writes at most max_drafts ids that follow `text` (length tokens of the lane). `owner` is whose
  // text the lane holds: another one, or a shorter text, starts the lane's index anew.
  NgramDraft propose(int lane, int64_t owner, const int32_t* text, int32_t length,
                     int32_t max_drafts, int32_t* draft_ids);

  int num_lanes() const { return static_cast<int>(lanes_.size()); }
  int64_t num_bytes() const;

 private:
  struct Lane {
    int64_t owner = -1;
    int32_t num_indexed = 0;
    int32_t last_indexed_id = 0;
    NgramChains singles{1};
    NgramChains pairs{2};
  };
  // A match ends at `end`, the index of its last token; -1: none.
  struct Match {
    int32_t end = -1;
    int32_t length = 0;
  };

  void update(Lane& lane, int64_t owner, const int32_t* text, int32_t length) const;
  Match find(const Lane& lane, const int32_t* text, int32_t last) const;

  int max_match_;
  int min_match_;
  std::vector<Lane> lanes_;
};

}  // namespace fulcrum
