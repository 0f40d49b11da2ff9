// Byte-pair merging: turns the words of a pre-tokenized text into token ids. Owns the merge table,
// the table of initial symbols and a bounded cache of words. Called by engine/tokenizer/bpe.py
// through bindings_tokenizer.cpp; knows nothing of regular expressions or special tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fulcrum {

// What a pair of neighbouring symbols becomes, and how early: a lower rank merges first.
struct Merge {
  int32_t rank;
  int32_t merged_id;
};

// (left id, right id) -> Merge. Open addressing: a lookup is one or two cache lines, and a text
// needs several of them for each of its bytes.
class MergeTable {
 public:
  // merges is (num_merges, 3): left id, right id, merged id; the row is the rank. Where a pair
  // stands twice, the later row wins, as in the reference implementation.
  MergeTable(const int32_t* merges, size_t num_merges);

  // Null where the pair does not merge.
  const Merge* find(int32_t left_id, int32_t right_id) const;

 private:
  struct Slot {
    uint64_t key;
    Merge merge;
  };
  size_t slot_index(uint64_t key) const;

  std::vector<Slot> slots_;  // a power of two, at most half full
  int shift_;                // 64 - log2(slots_.size())
};

// The symbols that a word is first cut into.
struct InitialSymbols {
  static constexpr int32_t kMissing = -1;

  std::vector<int32_t> byte_ids;                   // (256,), kMissing where the vocabulary has none
  std::unordered_map<uint32_t, int32_t> char_ids;  // code point -> id; used if per_char
  bool per_char = false;          // characters first, bytes only for those that char_ids lacks
  int32_t unknown_id = kMissing;  // for a character that has no bytes either; kMissing drops it
  bool fuse_unknown = false;      // a run of unknown characters is one unknown id
};

// Immutable but for the cache, which has its own lock: any number of threads may encode at once.
class Bpe {
 public:
  // whole_words maps the bytes of a word to its id where the vocabulary overrules the merges
  // (`ignore_merges`); empty elsewhere.
  Bpe(InitialSymbols initial, MergeTable merges,
      std::unordered_map<std::string, int32_t> whole_words);

  // Append the ids of one word of valid UTF-8. O(n log n) in its length.
  void encode_word(std::string_view word, std::vector<int32_t>* ids) const;

 private:
  bool append_cached(const std::string& word, std::vector<int32_t>* ids) const;
  void remember(const std::string& word, const int32_t* ids, size_t num_ids) const;
  void append_initial(std::string_view word, std::vector<int32_t>* symbols) const;
  void merge_short(std::vector<int32_t>* symbols) const;
  void merge_long(std::vector<int32_t>* symbols) const;

  InitialSymbols initial_;
  MergeTable merges_;
  std::unordered_map<std::string, int32_t> whole_words_;

  mutable std::shared_mutex cache_mutex_;
  mutable std::unordered_map<std::string, std::vector<int32_t>> cache_;
};

}  // namespace fulcrum
