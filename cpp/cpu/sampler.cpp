// The sampler on the CPU; sampler.h states what it computes.
#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cfloat>
#include <cmath>
#include <functional>

#include "noise.h"
#include "row_passes.h"
#include "truncation.h"

namespace fulcrum {
namespace {

constexpr double kLeastNoise = 0x1p-33;  // the least value of exponential_noise

// The race of exponential clocks: token i rings at E_i / weight_i, the first one is the sample.
struct Race {
  NoiseKey key;
  const int32_t* noise_ids = nullptr;  // where the vocabulary is a part of another's
  double time = 0.0;
  int32_t winner = -1;

  double noise(int32_t id) const {
    const int32_t noise_id = noise_ids == nullptr ? id : noise_ids[id];
    return exponential_noise(noise_bits(key, static_cast<uint32_t>(noise_id)));
  }

  void start(int32_t id) {  // with a token of weight 1
    winner = id;
    time = noise(id);
  }

  void enter(int32_t id, float weight) {
    const double t = noise(id) / static_cast<double>(weight);
    if (t < time || (t == time && id < winner)) {
      time = t;
      winner = id;
    }
  }

  // Could a token of this weight still win, whatever its noise?
  bool open_to(float weight) const { return kLeastNoise <= time * static_cast<double>(weight); }

  // Enters those of a chunk's tokens that pass a test without a logarithm: E >= u, so a token can
  // win only if u <= time * weight. The factor covers the rounding of the float comparison.
  void enter_chunk(const WordChunk& ids, const FloatChunk& weights, float min_weight) {
    const float bound = static_cast<float>(time) * 1.0001f;
    const WordChunk noisy = noise_ids == nullptr ? ids : look_up(ids, weights, min_weight);
    Mask hits[kVectors];
    Mask any = {};
    for (int k = 0; k < kVectors; ++k) {
      const Words bits = noise_bits(key, noisy.part[k]) >> 1;
      const Floats u = __builtin_convertvector(std::bit_cast<Mask>(bits), Floats) * 0x1p-31f;
      hits[k] = (u <= weights.part[k] * bound) & (weights.part[k] >= min_weight);
      any |= hits[k];
    }
    if (!any_of(any)) return;
    for (int j = 0; j < kChunk; ++j) {
      if (hits[j / 4][j % 4] == 0) continue;
      enter(static_cast<int32_t>(ids.part[j / 4][j % 4]), weights.part[j / 4][j % 4]);
    }
  }

  // The noise ids of a chunk's tokens; those that cannot win, or lie beyond the row, keep theirs.
  WordChunk look_up(const WordChunk& ids, const FloatChunk& weights, float min_weight) const {
    WordChunk noisy = ids;
    for (int j = 0; j < kChunk; ++j) {
      if (weights.part[j / 4][j % 4] < min_weight) continue;
      noisy.part[j / 4][j % 4] = static_cast<uint32_t>(noise_ids[ids.part[j / 4][j % 4]]);
    }
    return noisy;
  }
};

// The ids from `first` on.
inline WordChunk consecutive_ids(int first) {
  WordChunk ids;
  for (uint32_t k = 0; k < kVectors; ++k) {
    ids.part[k] = Words{0, 1, 2, 3} + (static_cast<uint32_t>(first) + 4 * k);
  }
  return ids;
}

int32_t draw(const RowParams& p, float* logits, int V, const RowScan& scan, SamplerScratch& s) {
  const float scale = std::min(1.0f / p.temperature, FLT_MAX);
  const bool top_p = p.top_p < 1.0f;
  const bool truncated = top_p || (p.top_k > 0 && p.top_k < V);
  // The heaviest token, of weight 1, rings before 22.9, any other not before 2^-33 / weight: one
  // whose weight is below 2^-33 / 22.9 > exp(-26.1) cannot win. Only top-p needs their mass, down
  // to where exp_negative is 0.
  const float min_exponent = top_p ? -87.0f : -26.1f;
  const double total = weigh_row(logits, V, scan.max, scale, min_exponent, s.block_max.data());
  Race race{noise_key(p.seed, p.noise_position), p.noise_ids};
  race.start(scan.argmax);
  const float min_weight = std::max(p.min_p, FLT_MIN);
  if (truncated) {
    const int n = truncate_row(p, logits, V, total, s);
    for (int i = 0; i < n; i += kChunk) {
      const FloatChunk weights = FloatChunk::load(&s.weights[i], n - i, 0.0f);
      race.enter_chunk(WordChunk::load(&s.ids[i], n - i, 0), weights, min_weight);
    }
    return race.winner;
  }
  for (int b = 0; b < num_blocks(V); ++b) {
    if (s.block_max[b] < min_weight || !race.open_to(s.block_max[b])) continue;
    for (int i = b * kBlock; i < block_end(b, V); i += kChunk) {
      race.enter_chunk(consecutive_ids(i), FloatChunk::load(logits + i, V - i, 0.0f), min_weight);
    }
  }
  return race.winner;
}

bool has_penalties(const RowParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

// Applies the penalties; false if an id is outside the vocabulary. counts: all zero before and
// after; meanwhile 1 stands for "in the history" and each output token adds 2.
bool penalize(const RowParams& p, float* logits, int V, int32_t* counts) {
  for (int i = 0; i < p.history_size; ++i) {
    if (static_cast<uint32_t>(p.history_ids[i]) >= static_cast<uint32_t>(V)) return false;
  }
  for (int i = 0; i < p.history_size; ++i) {
    const int32_t id = p.history_ids[i];
    if (counts[id] == 0) {
      float& x = logits[id];
      x = x > 0.0f ? x / p.repetition_penalty : x * p.repetition_penalty;
      counts[id] = 1;
    }
    if (i >= p.output_start) counts[id] += 2;
  }
  for (int i = p.output_start; i < p.history_size; ++i) {
    const int32_t id = p.history_ids[i];
    const int32_t times = counts[id] / 2;
    if (times == 0) continue;
    logits[id] -= p.frequency_penalty * static_cast<float>(times) + p.presence_penalty;
    counts[id] = 1;
  }
  for (int i = 0; i < p.history_size; ++i) counts[p.history_ids[i]] = 0;
  return true;
}

bool add_bias(const RowParams& p, float* logits, int V) {
  for (int i = 0; i < p.bias_size; ++i) {
    if (static_cast<uint32_t>(p.bias_ids[i]) >= static_cast<uint32_t>(V)) return false;
    logits[p.bias_ids[i]] += p.bias_values[i];
  }
  return true;
}

// The bits of a float as an integer that orders as the floats do.
inline uint32_t ordered_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);  // -0 becomes +0, its equal
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

inline float log_softmax(float logit, float max, double log_sum) {
  return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_sum);
}

// The n most probable tokens. The n-th largest block maximum is a lower bound of the n-th largest
// logit, since that many blocks reach it: only blocks that do are looked into.
void find_top(const float* logits, int V, float max, double log_sum, int n, SamplerScratch& s,
              RowResult* out) {
  const int blocks = num_blocks(V);
  float least = -kInfinity;
  if (n <= blocks) {
    float* maxima = s.weights.data();
    std::copy_n(s.block_max.data(), blocks, maxima);
    std::nth_element(maxima, maxima + n - 1, maxima + blocks, std::greater<>());
    least = maxima[n - 1];
  }
  uint64_t* keys = s.keys.data();
  int num_keys = 0;
  for (int b = 0; b < blocks; ++b) {
    if (s.block_max[b] < least) continue;
    for (int i = b * kBlock; i < block_end(b, V); ++i) {
      if (logits[i] < least) continue;
      keys[num_keys++] = uint64_t{ordered_bits(logits[i])} << 32 | ~static_cast<uint32_t>(i);
    }
  }
  std::partial_sort(keys, keys + n, keys + num_keys, std::greater<>());
  out->num_top = n;
  for (int i = 0; i < n; ++i) {
    out->top_ids[i] = static_cast<int32_t>(~static_cast<uint32_t>(keys[i]));
    out->top_logprobs[i] = log_softmax(logits[out->top_ids[i]], max, log_sum);
  }
}

}  // namespace

const char* describe(RowError error) {
  switch (error) {
    case RowError::kNone:
      return "no error";
    case RowError::kNotFinite:
      return "a logit is NaN or infinite";
    case RowError::kAllBanned:
      return "every token is banned";
    case RowError::kIdOutOfRange:
      return "a token id lies outside the vocabulary";
  }
  return "unknown error";
}

SamplerScratch::SamplerScratch(int V)
    : block_max(num_blocks(V)), weights(V + 1), ids(V + 1), keys(V), raw(V), counts(V) {}

size_t SamplerScratch::bytes() const {
  const auto bytes_of = [](const auto& values) { return values.size() * sizeof(values[0]); };
  return bytes_of(block_max) + bytes_of(weights) + bytes_of(ids) + bytes_of(keys) + bytes_of(raw) +
         bytes_of(counts);
}

void sample_row(const RowParams& p, float* logits, int V, SamplerScratch& s, RowResult* out) {
  assert(V > 0 && static_cast<size_t>(V) <= s.counts.size());
  *out = RowResult{};
  const auto fail = [out](RowError error) { out->error = error; };
  if (p.target_id >= V) return fail(RowError::kIdOutOfRange);

  RowScan scan = scan_row(logits, V, s.block_max.data());
  if (!scan.finite) return fail(RowError::kNotFinite);
  if (scan.max == -kInfinity) return fail(RowError::kAllBanned);

  const bool wants_logprob = p.num_logprobs >= 0 || p.target_id >= 0;
  const float raw_max = scan.max;
  double log_sum = 0.0;
  if (wants_logprob) {
    log_sum = std::log(sum_exp(logits, V, raw_max));
    const int num_top = std::min({p.num_logprobs, V, kMaxLogprobs});
    if (num_top > 0) find_top(logits, V, raw_max, log_sum, num_top, s, out);
    std::copy_n(logits, V, s.raw.data());
  }
  out->id = p.target_id;
  if (p.target_id < 0) {
    if (has_penalties(p) || p.bias_size > 0) {
      if (!penalize(p, logits, V, s.counts.data()) || !add_bias(p, logits, V)) {
        return fail(RowError::kIdOutOfRange);
      }
      scan = scan_row(logits, V, s.block_max.data());
      if (!scan.finite) return fail(RowError::kNotFinite);
      if (scan.max == -kInfinity) return fail(RowError::kAllBanned);
    }
    out->id = p.temperature > 0.0f ? draw(p, logits, V, scan, s) : scan.argmax;
  }
  if (wants_logprob) out->logprob = log_softmax(s.raw[out->id], raw_max, log_sum);
}

}  // namespace fulcrum
