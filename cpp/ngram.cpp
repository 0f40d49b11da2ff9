#include "ngram.h"

#include <algorithm>
#include <bit>
#include <cstddef>

namespace fulcrum {
namespace {

constexpr size_t kMinHeads = 64;
// Candidates compared with the end of the text before the longest so far is taken: bounds the cost
// in texts where one pair of tokens stands at every other place.
constexpr int kMaxCandidates = 256;

// Tokens before and at `a` that equal those before and at `b`, at most `limit`; a < b.
int32_t common_suffix(const int32_t* text, int32_t a, int32_t b, int32_t limit) {
  limit = std::min(limit, a + 1);
  int32_t length = 0;
  while (length < limit && text[a - length] == text[b - length]) ++length;
  return length;
}

}  // namespace

uint32_t NgramChains::slot(const int32_t* text, int32_t last) const {
  uint32_t key = 0;
  for (int i = 0; i < num_tokens_; ++i) {
    key = (key ^ static_cast<uint32_t>(text[last - i])) * 0x9e3779b1u;
    key ^= key >> 15;
  }
  return (key * 0x85ebca6bu) >> shift_;
}

void NgramChains::clear() {
  // Of a long text before this one nothing is kept: a lane's memory follows the text it holds.
  std::vector<int32_t>().swap(heads_);
  std::vector<int32_t>().swap(previous_);
}

void NgramChains::rebuild(const int32_t* text, int32_t end) {
  const size_t num_heads = std::max(kMinHeads, std::bit_ceil(2 * static_cast<size_t>(end)));
  heads_.assign(num_heads, -1);
  shift_ = 32 - std::countr_zero(num_heads);
  previous_.clear();
  extend(text, end);
}

void NgramChains::extend(const int32_t* text, int32_t end) {
  if (static_cast<size_t>(end) > heads_.size()) return rebuild(text, end);
  for (int32_t i = static_cast<int32_t>(previous_.size()); i < end; ++i) {
    if (i + 1 < num_tokens_) {  // too few tokens end here
      previous_.push_back(-1);
      continue;
    }
    int32_t& head = heads_[slot(text, i)];
    previous_.push_back(head);
    head = i;
  }
}

int32_t NgramChains::newest(const int32_t* text, int32_t last) const {
  if (heads_.empty() || last + 1 < num_tokens_) return -1;
  return heads_[slot(text, last)];
}

int64_t NgramChains::num_bytes() const {
  return static_cast<int64_t>((heads_.capacity() + previous_.capacity()) * sizeof(int32_t));
}

NgramIndex::NgramIndex(int num_lanes, int max_match, int min_match)
    : max_match_(max_match), min_match_(min_match), lanes_(static_cast<size_t>(num_lanes)) {}

int64_t NgramIndex::num_bytes() const {
  int64_t total = 0;
  for (const Lane& lane : lanes_) total += lane.singles.num_bytes() + lane.pairs.num_bytes();
  return total;
}

void NgramIndex::update(Lane& lane, int64_t owner, const int32_t* text, int32_t length) const {
  // The last token is what is looked up: it is indexed once another follows it.
  const int32_t end = length - 1;
  const bool continues =
      lane.owner == owner && lane.num_indexed <= end &&
      (lane.num_indexed == 0 || text[lane.num_indexed - 1] == lane.last_indexed_id);
  if (!continues) {
    lane.owner = owner;
    lane.singles.clear();
    lane.pairs.clear();
  }
  if (min_match_ == 1) lane.singles.extend(text, end);
  lane.pairs.extend(text, end);
  lane.num_indexed = end;
  lane.last_indexed_id = end > 0 ? text[end - 1] : 0;
}

NgramIndex::Match NgramIndex::find(const Lane& lane, const int32_t* text, int32_t last) const {
  Match best;
  int num_left = kMaxCandidates;
  for (int32_t end = lane.pairs.newest(text, last); end >= 0 && num_left > 0; --num_left) {
    const int32_t length = common_suffix(text, end, last, max_match_);
    if (length > best.length) best = {end, length};
    if (length == max_match_) break;
    end = lane.pairs.older(end);
  }
  // A hash of a pair that is another pair's may give a match of one token, or of none.
  if (best.length >= std::max(min_match_, 2)) return best;
  if (min_match_ > 1) return {};
  num_left = kMaxCandidates;
  for (int32_t end = lane.singles.newest(text, last); end >= 0 && num_left > 0; --num_left) {
    if (text[end] == text[last]) return {end, 1};
    end = lane.singles.older(end);
  }
  return {};
}

NgramDraft NgramIndex::propose(int lane_index, int64_t owner, const int32_t* text, int32_t length,
                               int32_t max_drafts, int32_t* draft_ids) {
  Lane& lane = lanes_[static_cast<size_t>(lane_index)];
  if (length < 1) return {0, 0};
  update(lane, owner, text, length);
  if (max_drafts < 1) return {0, 0};
  const Match match = find(lane, text, length - 1);
  if (match.length == 0) return {0, 0};
  // Where the source reaches the end of the text, the draft goes on from its own beginning: the
  // text is then about to repeat a period of length - 1 - match.end tokens.
  const int32_t start = match.end + 1;
  for (int32_t i = 0; i < max_drafts; ++i) {
    draft_ids[i] = start + i < length ? text[start + i] : draft_ids[start + i - length];
  }
  return {max_drafts, match.length};
}

}  // namespace fulcrum
