// Model's attention: how a step's queries are cut into units that threads share, positions and the
// cache's writes, and the units' computation. Called by the forward pass in model.cpp.
#include <algorithm>

#include "model.h"

namespace fulcrum {

void Model::plan_tiles(Step* step) {
  const int group = config_.num_heads / config_.num_kv_heads;
  const int most = std::clamp(kMaxTileRows / group, 1, kMaxTileTokens);
  tiles_.clear();
  for (int s = 0; s < step->num_sequences; ++s) {
    for (int t = batch_.query_start[s]; t < batch_.query_start[s + 1]; t += most) {
      const int end = std::min(t + most, batch_.query_start[s + 1]);
      const auto kept = std::lower_bound(kept_rows_.begin(), kept_rows_.end(), t);
      tiles_.push_back({s, t, end - t, kept != kept_rows_.end() && *kept < end});
    }
  }
  step->num_tiles = static_cast<int>(tiles_.size());
}

void Model::plan_parts(Step* step) {
  parts_.clear();
  const int num_units = static_cast<int>(tiles_.size()) * config_.num_kv_heads;
  if (num_threads() == 1 || num_units > kMaxPartedUnits * num_threads()) return;
  const int group = config_.num_heads / config_.num_kv_heads;
  for (const Tile& tile : tiles_) {
    if (tile.num_tokens * group > kMaxPartRows) return;
  }
  for (int i = 0; i < static_cast<int>(tiles_.size()); ++i) {
    const int position = batch_.positions[tiles_[i].first_token];
    const int num_segments = attention_segments(position, tiles_[i].num_tokens, 0).end;
    for (int head = 0; head < config_.num_kv_heads; ++head) {
      for (int segment = 0; segment < num_segments; ++segment) {
        parts_.push_back({i, head, segment});
      }
    }
  }
  // Short sequences are not worth the second operation.
  if (static_cast<int>(parts_.size()) > num_units) {
    step->num_parts = static_cast<int>(parts_.size());
  }
}

void Model::rotate_and_cache(const Step& step, int layer, int thread) {
  const Config& c = config_;
  const LayerWeights& w = weights_.layers[layer];
  const int HD = c.head_dim, half = HD / 2;
  const int64_t table = c.layer_rope_index[layer] * int64_t{limits_.max_tokens} * half;
  for_units(thread, step.num_tokens, [&](int t) {
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
    for (int head = 0; head < c.num_kv_heads; ++head) {
      write_kv_(k + head * HD, v + head * HD, HD, static_cast<int>(slot % kBlockSize),
                kv_.block(layer, slot / kBlockSize, head));
    }
  });
}

void Model::attend(const Step& step, int layer, int thread) {
  if (step.num_parts > 0 && config_.layer_windows[layer] == 0) {
    return attend_parts(step, layer, thread);
  }
  float* scratch = state_.attention_scratch[thread].as<float>();
  const int num_kv_heads = config_.num_kv_heads;
  // The later a tile, the more keys it sees: the last ones first, so that threads finish together.
  const int num_units = step.num_tiles * num_kv_heads;
  const bool cuts = is_cut(step, layer);
  for_units(thread, num_units, [&](int i) {
    const int unit = num_units - 1 - i;
    const Tile& tile = tiles_[unit / num_kv_heads];
    if (cuts && !tile.is_kept) return;
    attend_(attention_unit(tile, layer, unit % num_kv_heads), scratch);
  });
}

// The segments by any thread each, then what they come to.
void Model::attend_parts(const Step& step, int layer, int thread) {
  float* scratch = state_.attention_scratch[thread].as<float>();
  float* states = attention_states_.as<float>();
  const int64_t most = attention_state_floats(kMaxPartRows, config_.head_dim);
  for_units(thread, step.num_parts, [&](int i) {
    const AttentionPart& part = parts_[i];
    const AttentionUnit unit = attention_unit(tiles_[part.tile], layer, part.kv_head);
    const int64_t floats = attention_state_floats(unit.num_tokens * unit.num_heads, unit.head_dim);
    float* first = states + (i - part.segment) * most;
    attend_segment_(unit, part.segment, scratch, first + part.segment * floats);
  });
  for_units(thread, step.num_parts, [&](int i) {
    const AttentionPart& part = parts_[i];
    if (part.segment > 0) return;
    int num_segments = 1;
    while (i + num_segments < step.num_parts && parts_[i + num_segments].segment > 0) {
      ++num_segments;
    }
    vector_->merge_segments(attention_unit(tiles_[part.tile], layer, part.kv_head),
                            states + i * most, num_segments, scratch);
  });
}

AttentionUnit Model::attention_unit(const Tile& tile, int layer, int kv_head) const {
  const Config& c = config_;
  const int group = c.num_heads / c.num_kv_heads;
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
  unit.kv = kv_.block(layer, 0, kv_head);
  unit.block_stride = kv_.block_stride();
  unit.group_stride = kv_.group_stride();
  return unit;
}

}  // namespace fulcrum
