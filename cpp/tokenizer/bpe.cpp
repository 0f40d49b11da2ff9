#include "bpe.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <queue>
#include <utility>

namespace fulcrum {
namespace {

// No pair has negative ids, so this key marks a free slot.
constexpr uint64_t kFreeKey = std::numeric_limits<uint64_t>::max();

constexpr size_t kMaxCachedWords = 1 << 16;
constexpr size_t kMaxCachedBytes = 64;  // longer words hardly ever come back

// Up to here, looking for the best pair anew after each merge is faster than a queue.
constexpr size_t kMaxShortSymbols = 48;

uint64_t pair_key(int32_t left_id, int32_t right_id) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left_id)) << 32) |
         static_cast<uint32_t>(right_id);
}

int utf8_length(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

uint32_t code_point(std::string_view bytes) {
  if (bytes.size() == 1) return static_cast<unsigned char>(bytes[0]);
  uint32_t code = static_cast<unsigned char>(bytes[0]) & (0x7Fu >> bytes.size());
  for (size_t i = 1; i < bytes.size(); ++i) {
    code = (code << 6) | (static_cast<unsigned char>(bytes[i]) & 0x3Fu);
  }
  return code;
}

// A symbol of a word that is being merged: a doubly linked list in an array.
struct Symbol {
  int32_t id;
  int32_t previous;  // index, -1 at the start
  int32_t next;      // index, -1 at the end
};

struct Candidate {
  int32_t rank;
  int32_t left_index;
  int32_t merged_id;

  // std::priority_queue puts the greatest first: lowest rank, then leftmost.
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : left_index > other.left_index;
  }
};

}  // namespace

MergeTable::MergeTable(const int32_t* merges, size_t num_merges) {
  int log2_slots = 1;
  while ((size_t{1} << log2_slots) < 2 * num_merges) ++log2_slots;
  shift_ = 64 - log2_slots;
  slots_.assign(size_t{1} << log2_slots, Slot{kFreeKey, {0, 0}});
  for (size_t i = 0; i < num_merges; ++i) {
    const uint64_t key = pair_key(merges[3 * i], merges[3 * i + 1]);
    slots_[slot_index(key)] = Slot{key, {static_cast<int32_t>(i), merges[3 * i + 2]}};
  }
}

size_t MergeTable::slot_index(uint64_t key) const {
  const size_t mask = slots_.size() - 1;
  size_t index = static_cast<size_t>((key * 0x9E3779B97F4A7C15ull) >> shift_);
  while (slots_[index].key != kFreeKey && slots_[index].key != key) index = (index + 1) & mask;
  return index;
}

const Merge* MergeTable::find(int32_t left_id, int32_t right_id) const {
  const Slot& slot = slots_[slot_index(pair_key(left_id, right_id))];
  return slot.key == kFreeKey ? nullptr : &slot.merge;
}

Bpe::Bpe(InitialSymbols initial, MergeTable merges,
         std::unordered_map<std::string, int32_t> whole_words)
    : initial_(std::move(initial)),
      merges_(std::move(merges)),
      whole_words_(std::move(whole_words)) {}

void Bpe::encode_word(std::string_view word, std::vector<int32_t>* ids) const {
  const bool cacheable = word.size() <= kMaxCachedBytes;
  const std::string key = cacheable ? std::string(word) : std::string();
  if (cacheable && append_cached(key, ids)) return;
  if (!whole_words_.empty()) {
    const auto found = whole_words_.find(std::string(word));
    if (found != whole_words_.end()) {
      ids->push_back(found->second);
      return;
    }
  }
  std::vector<int32_t> symbols;
  symbols.reserve(word.size());
  append_initial(word, &symbols);
  if (symbols.size() <= kMaxShortSymbols) {
    merge_short(&symbols);
  } else {
    merge_long(&symbols);
  }
  if (cacheable) remember(key, symbols.data(), symbols.size());
  ids->insert(ids->end(), symbols.begin(), symbols.end());
}

bool Bpe::append_cached(const std::string& word, std::vector<int32_t>* ids) const {
  std::shared_lock<std::shared_mutex> lock(cache_mutex_);
  const auto found = cache_.find(word);
  if (found == cache_.end()) return false;
  ids->insert(ids->end(), found->second.begin(), found->second.end());
  return true;
}

void Bpe::remember(const std::string& word, const int32_t* ids, size_t num_ids) const {
  std::unique_lock<std::shared_mutex> lock(cache_mutex_);
  // Starting over keeps the bound without any bookkeeping on the far more frequent hits.
  if (cache_.size() >= kMaxCachedWords) cache_.clear();
  cache_.emplace(word, std::vector<int32_t>(ids, ids + num_ids));
}

void Bpe::append_initial(std::string_view word, std::vector<int32_t>* symbols) const {
  constexpr int32_t kMissing = InitialSymbols::kMissing;
  const auto append_unknown = [&](bool after_unknown) {
    if (initial_.unknown_id == kMissing) return false;
    if (!(after_unknown && initial_.fuse_unknown)) symbols->push_back(initial_.unknown_id);
    return true;
  };
  bool after_unknown = false;
  for (size_t i = 0; i < word.size();) {
    const size_t length = initial_.per_char ? utf8_length(static_cast<unsigned char>(word[i])) : 1;
    const std::string_view unit = word.substr(i, length);
    i += length;
    if (initial_.per_char) {
      const auto found = initial_.char_ids.find(code_point(unit));
      if (found != initial_.char_ids.end()) {
        symbols->push_back(found->second);
        after_unknown = false;
        continue;
      }
    }
    const auto byte_id = [&](char byte) {
      return initial_.byte_ids[static_cast<unsigned char>(byte)];
    };
    const bool has_bytes =
        std::all_of(unit.begin(), unit.end(), [&](char b) { return byte_id(b) != kMissing; });
    if (has_bytes) {
      for (const char byte : unit) symbols->push_back(byte_id(byte));
      after_unknown = false;
    } else {
      after_unknown = append_unknown(after_unknown);
    }
  }
}

void Bpe::merge_short(std::vector<int32_t>* symbols) const {
  while (symbols->size() > 1) {
    const Merge* best = nullptr;
    size_t best_index = 0;
    for (size_t i = 0; i + 1 < symbols->size(); ++i) {
      const Merge* merge = merges_.find((*symbols)[i], (*symbols)[i + 1]);
      if (merge != nullptr && (best == nullptr || merge->rank < best->rank)) {
        best = merge;
        best_index = i;
      }
    }
    if (best == nullptr) return;
    (*symbols)[best_index] = best->merged_id;
    symbols->erase(symbols->begin() + static_cast<std::ptrdiff_t>(best_index) + 1);
  }
}

void Bpe::merge_long(std::vector<int32_t>* symbols) const {
  const int32_t num_symbols = static_cast<int32_t>(symbols->size());
  std::vector<Symbol> chain(symbols->size());
  for (int32_t i = 0; i < num_symbols; ++i) {
    chain[i] = {(*symbols)[i], i - 1, i + 1 < num_symbols ? i + 1 : -1};
  }
  std::vector<Candidate> found;
  found.reserve(symbols->size());
  for (int32_t i = 0; i + 1 < num_symbols; ++i) {
    if (const Merge* merge = merges_.find(chain[i].id, chain[i + 1].id)) {
      found.push_back({merge->rank, i, merge->merged_id});
    }
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(found));
  const auto offer = [&](int32_t left_index) {
    if (left_index < 0 || chain[left_index].next < 0) return;
    const Merge* merge = merges_.find(chain[left_index].id, chain[chain[left_index].next].id);
    if (merge != nullptr) queue.push({merge->rank, left_index, merge->merged_id});
  };
  constexpr int32_t kConsumed = -1;
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = chain[top.left_index];
    if (left.id == kConsumed || left.next < 0) continue;
    Symbol& right = chain[left.next];
    // The pair may have changed since it was queued: its spelling, so its id, tells.
    const Merge* merge = merges_.find(left.id, right.id);
    if (merge == nullptr || merge->merged_id != top.merged_id) continue;
    left.id = top.merged_id;
    right.id = kConsumed;
    left.next = right.next;
    if (left.next >= 0) chain[left.next].previous = top.left_index;
    offer(left.previous);
    offer(top.left_index);
  }
  symbols->clear();
  for (int32_t i = 0; i >= 0; i = chain[i].next) symbols->push_back(chain[i].id);
}

}  // namespace fulcrum
