// Model's linear layers: how a step's rows and channels are shared among threads, and what is
// computed with them while they are in the cache. Called by the forward pass in model.cpp.
#include <algorithm>

#include "model.h"

namespace fulcrum {
namespace {

constexpr int kFewRows = 8;  // that kernels compute in one reading of the weights

// Of more rows threads take blocks of about this size: small enough that all finish together and
// that what a block is multiplied to stays in the cache, large enough that weights are read seldom.
constexpr int kRowBlock = 96;
constexpr int kBlockGroups = 4;  // groups of channels of a block of gate and up

// Rows of a step in blocks of about equal size, all but the last a multiple of what kernels take at
// once.
struct RowBlocks {
  explicit RowBlocks(int num_rows) : num_rows(num_rows) {
    if (num_rows <= kRowBlock) return;
    const int most = (num_rows + kRowBlock - 1) / kRowBlock;
    size = ((num_rows + most - 1) / most + kMultiple - 1) / kMultiple * kMultiple;
    count = (num_rows + size - 1) / size;
  }
  int begin(int block) const { return block * size; }
  int end(int block) const { return std::min((block + 1) * size, num_rows); }

  static constexpr int kMultiple = 12;  // of six and of twelve rows
  int num_rows;
  int size = kRowBlock;
  int count = 1;
};

// From value `first` of row t on, a multiple of kGroupSize.
Activations part_of_row(const Activations& x, int K, int t, int first) {
  const int64_t group = int64_t{t} * num_groups(K) + first / kGroupSize;
  int16_t* widened = x.widened == nullptr ? nullptr : x.widened + group * kGroupSize;
  uint16_t* rounded = x.rounded == nullptr ? nullptr : x.rounded + group * kGroupSize;
  return {x.values + t * x.ld_values + first,
          x.ld_values,
          x.quantized + group * kGroupSize,
          widened,
          x.scales + group,
          x.sums + group,
          x.totals + group,
          rounded};
}

// Rows from t on.
Activations rows_from(const Activations& x, int K, int t) { return part_of_row(x, K, t, 0); }

}  // namespace

// Whether kernels read w's activations in another form than the values.
bool Model::needs_prepared(const Matrix& w) const {
  return format_info(w.packed.format).reads_integers || linear_->reads_rounded;
}

int64_t gate_up_floats(const Config& c) {
  const int64_t of_few = int64_t{kFewRows} * 2 * padded_k(c.intermediate_size);
  return std::max(of_few, int64_t{kRowBlock} * 2 * kBlockGroups * kGroupSize);
}

// y[:, parts side by side] = x @ part^T.
void Model::multiply(int thread, std::initializer_list<const Matrix*> parts, const Activations& x,
                     int num_rows, float* y, int64_t ld_y, bool accumulate) {
  const auto tiles_of = [this](const Matrix* part) {
    const int channels = linear_->tile_channels(part->packed.format);
    return (part->packed.N + channels - 1) / channels;
  };
  int num_tiles = 0;
  for (const Matrix* part : parts) num_tiles += tiles_of(part);
  // Of many rows kernels compute two tiles at once, so a thread takes an even number of them.
  const int unit = num_rows > kFewRows ? 2 : 1;
  const int num_units = (num_tiles + unit - 1) / unit;
  const auto multiply_tiles = [&](int t, int t_end, int begin, int end) {
    int first_tile = 0;
    int64_t channel = 0;
    for (const Matrix* part : parts) {
      const int tiles = tiles_of(part);
      const int low = std::max(begin - first_tile, 0), high = std::min(end - first_tile, tiles);
      if (low < high) {
        linear_->gemm(part->packed, rows_from(x, part->packed.K, t), t_end - t,
                      y + t * ld_y + channel, ld_y, low, high, accumulate);
      }
      first_tile += tiles;
      channel += part->packed.N;
    }
  };
  const RowBlocks blocks(num_rows);
  pool_->share(thread, num_units * blocks.count, [&](int begin, int end) {
    while (begin < end) {
      const int block = begin / num_units, first = begin % num_units;
      const int last = std::min(first + end - begin, num_units);
      multiply_tiles(blocks.begin(block), blocks.end(block), first * unit,
                     std::min(last * unit, num_tiles));
      begin += last - first;
    }
  });
}

// Adds the former branch where it waits for its post norm; returns norm(hidden), quantized.
Activations Model::norm_rows(const Step& step, const FloatVector& weight,
                             const FloatVector& post_norm, int thread) {
  const int D = config_.hidden_size;
  const bool alone = replicates(step) && post_norm.empty();
  const Operand& operand = alone ? state_.own[thread] : state_.shared;
  const Activations x = operand.activations(operand.normed, D);
  const auto norm_row = [&](int t) {
    float* hidden = state_.hidden + int64_t{t} * D;
    if (!post_norm.empty()) {
      float* branch = state_.branch + int64_t{t} * D;
      vector_->rms_norm(branch, post_norm.data(), config_.norm_eps, D, branch);
      vector_->add(hidden, branch, D);
    }
    vector_->rms_norm(hidden, weight.data(), config_.norm_eps, D, operand.normed + int64_t{t} * D);
    linear_->quantize_rows(x, D, t, t + 1);
  };
  if (alone) {
    for (int t = 0; t < step.num_tokens && pool_->is_next_open(thread); ++t) norm_row(t);
  } else {
    for_units(thread, step.num_tokens, norm_row);
  }
  return x;
}

Activations Model::quantize_attention(const Step& step, const Matrix& w, int thread) {
  const int K = config_.attention_size();
  const Operand& operand = replicates(step) ? state_.own[thread] : state_.shared;
  const Activations x = operand.activations(state_.attention, K);
  if (!needs_prepared(w)) return x;
  if (replicates(step)) {
    if (pool_->is_next_open(thread)) linear_->quantize_rows(x, K, 0, step.num_tokens);
  } else {
    for_units(thread, step.num_tokens, [&](int t) { linear_->quantize_rows(x, K, t, t + 1); });
  }
  return x;
}

// Ends a branch: onto the residual stream, or beside it where a post norm comes first.
void Model::residual(int thread, const Matrix& w, const Activations& x, const Step& step,
                     bool has_post_norm) {
  float* y = has_post_norm ? state_.branch : state_.hidden;
  multiply(thread, {&w}, x, step.num_tokens, y, config_.hidden_size, !has_post_norm);
}

// mlp = activation(x @ gate^T) * (x @ up^T), quantized where `down` reads integers. A unit is some
// groups of kGroupSize channels of a block of rows, from both products to the quantized groups.
void Model::gate_up(const Step& step, int layer, int thread, const Activations& x) {
  const int groups = num_groups(config_.intermediate_size);
  const RowBlocks blocks(step.num_tokens);
  if (blocks.count == 1) {
    // Few rows wait for their weights, which are best read in one long run.
    const int most = step.num_tokens <= kFewRows ? groups : kBlockGroups;
    return pool_->share(thread, groups, [&](int begin, int end) {
      for (int first = begin; first < end; first += most) {
        gate_up_groups(layer, thread, x, first, std::min(first + most, end), 0, step.num_tokens);
      }
    });
  }
  const int num_units = (groups + kBlockGroups - 1) / kBlockGroups * blocks.count;
  for_units(thread, num_units, [&](int unit) {
    const int first = unit / blocks.count * kBlockGroups, block = unit % blocks.count;
    gate_up_groups(layer, thread, x, first, std::min(first + kBlockGroups, groups),
                   blocks.begin(block), blocks.end(block));
  });
}

// The groups [first, end) of the rows [t, t_end).
void Model::gate_up_groups(int layer, int thread, const Activations& x, int first, int end, int t,
                           int t_end) {
  const LayerWeights& w = weights_.layers[layer];
  const int I = config_.intermediate_size;
  const int channel = first * kGroupSize, size = std::min(end * kGroupSize, I) - channel;
  const int64_t ld = 2 * int64_t{size};
  float* own = state_.gate_up[thread];
  const Activations rows = rows_from(x, config_.hidden_size, t);
  const auto multiply_groups = [&](const Matrix& part, float* y) {
    const int channels = linear_->tile_channels(part.packed.format);
    const int tiles = kGroupSize / channels;  // of a group, checked at load
    // Kernels count channels from the matrix's first one.
    linear_->gemm(part.packed, rows, t_end - t, y - channel, ld, first * tiles,
                  std::min(end * tiles, (I + channels - 1) / channels), false);
  };
  multiply_groups(w.gate, own);
  multiply_groups(w.up, own + size);
  const bool quantizes = needs_prepared(w.down);
  const Activations gated = state_.gated.activations(own, ld);
  for (int row = t; row < t_end; ++row, own += ld) {
    float* out = quantizes ? own : state_.mlp + int64_t{row} * I + channel;
    vector_->gate(config_.activation, own, own + size, size, out);
    if (quantizes) {
      Activations part = part_of_row(gated, I, row, channel);
      part.values = own;
      linear_->quantize_rows(part, size, 0, 1);
    }
  }
}

}  // namespace fulcrum
