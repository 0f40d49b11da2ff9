// Model's loading half: finds the slot, checks its shape, decodes and packs.
#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "model.h"
#include "quantize.h"

namespace fulcrum {
namespace {

[[noreturn]] void fail(const std::string& slot, int layer, const std::string& what) {
  const std::string place = layer < 0 ? "" : " of layer " + std::to_string(layer);
  throw std::invalid_argument(slot + place + ": " + what);
}

std::string shape(int64_t rows, int64_t cols) {
  std::string text = "(";
  return text.append(std::to_string(rows)).append(", ").append(std::to_string(cols)).append(")");
}

struct VectorSlot {
  const char* name;
  FloatVector LayerWeights::* member;
  bool required;
};

constexpr VectorSlot kVectorSlots[] = {
    {"attention_norm", &LayerWeights::attention_norm, true},
    {"q_norm", &LayerWeights::q_norm, false},
    {"k_norm", &LayerWeights::k_norm, false},
    {"attention_post_norm", &LayerWeights::attention_post_norm, false},
    {"mlp_norm", &LayerWeights::mlp_norm, true},
    {"mlp_post_norm", &LayerWeights::mlp_post_norm, false},
    {"q_bias", &LayerWeights::q_bias, false},
    {"k_bias", &LayerWeights::k_bias, false},
    {"v_bias", &LayerWeights::v_bias, false},
};

struct MatrixSlot {
  const char* name;
  Matrix LayerWeights::* member;
};

constexpr MatrixSlot kMatrixSlots[] = {
    {"q", &LayerWeights::q},       {"k", &LayerWeights::k},
    {"v", &LayerWeights::v},       {"attention_output", &LayerWeights::attention_output},
    {"gate", &LayerWeights::gate}, {"up", &LayerWeights::up},
    {"down", &LayerWeights::down},
};

int64_t vector_size(const Config& c, const std::string& slot) {
  if (slot == "q_norm" || slot == "k_norm") return c.head_dim;
  if (slot == "q_bias") return c.attention_size();
  if (slot == "k_bias" || slot == "v_bias") return int64_t{c.num_kv_heads} * c.head_dim;
  return c.hidden_size;
}

std::pair<int64_t, int64_t> matrix_shape(const Config& c, const std::string& slot) {
  if (slot == "q") return {c.attention_size(), c.hidden_size};
  if (slot == "k" || slot == "v") return {int64_t{c.num_kv_heads} * c.head_dim, c.hidden_size};
  if (slot == "attention_output") return {c.hidden_size, c.attention_size()};
  if (slot == "gate" || slot == "up") return {c.intermediate_size, c.hidden_size};
  if (slot == "down") return {c.hidden_size, c.intermediate_size};
  if (slot == "input_projection") return {c.hidden_size, 2 * int64_t{c.hidden_size}};
  return {c.vocab_size, c.hidden_size};
}

// llama.cpp's converter stores q and k of the llama architecture with the two rotated halves of
// a head interleaved. Returns the row of the file that holds row `row` in the usual order.
int64_t source_row(int64_t row, int head_dim, bool interleaved) {
  if (!interleaved) return row;
  const int64_t head = row / head_dim, channel = row % head_dim, half = head_dim / 2;
  return head * head_dim + (channel % half) * 2 + channel / half;
}

// The rows of one tile in the form that LinearKernels::pack takes.
struct TileRows {
  TileRows(int channels, int K)
      : scratch(K),
        values(size_t(channels) * K),
        quants(size_t(channels) * padded_k(K)),
        scales(size_t(channels) * num_groups(K)),
        minima(size_t(channels) * num_groups(K)) {}
  std::vector<float> scratch, values;
  std::vector<uint8_t> quants;
  std::vector<float> scales, minima;
};

}  // namespace

Model::Model(const Config& config, std::shared_ptr<ThreadPool> pool, const std::string& isa)
    : config_(config),
      linear_(linear_kernels(isa.c_str())),
      vector_(vector_kernels(isa.c_str())),
      pool_(std::move(pool)) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument(what);
  };
  require(linear_ != nullptr && vector_ != nullptr && isa_supported(isa.c_str()),
          "instruction set " + isa + " is not available on this machine");
  for (const FormatInfo& info : kFormats) {
    require(kGroupSize % linear_->tile_channels(info.format) == 0, "tiles do not divide groups");
  }
  const Config& c = config_;
  require(c.num_layers > 0 && c.hidden_size > 0 && c.intermediate_size > 0 && c.num_heads > 0 &&
              c.num_kv_heads > 0 && c.vocab_size > 0,
          "model sizes must be positive");
  require(c.head_dim > 0 && c.head_dim % 16 == 0,
          "head size " + std::to_string(c.head_dim) + " is not a multiple of 16");
  require(c.num_heads % c.num_kv_heads == 0 && c.num_heads / c.num_kv_heads <= kMaxTileRows,
          std::to_string(c.num_heads) + " query heads cannot share " +
              std::to_string(c.num_kv_heads) + " KV heads");
  require(
      int(c.layer_windows.size()) == c.num_layers && int(c.layer_rope_index.size()) == c.num_layers,
      "layer_windows and layer_rope_index need one entry a layer");
  for (int index : c.layer_rope_index) {
    require(index >= 0 && index < int(c.rope_inv_freq.size()), "layer_rope_index out of range");
  }
  for (const auto& table : c.rope_inv_freq) {
    require(int(table.size()) == c.head_dim / 2, "rope_inv_freq needs head_dim / 2 entries");
  }
  weights_.layers.resize(c.num_layers);
}

void Model::load_vector(const std::string& slot, int layer, const float* values, int64_t size) {
  FloatVector* target = nullptr;
  if (slot == "final_norm") {
    target = &weights_.final_norm;
  } else if (config_.reads_hidden && slot == "embedding_norm") {
    target = &weights_.embedding_norm;
  } else if (config_.reads_hidden && slot == "hidden_norm") {
    target = &weights_.hidden_norm;
  } else if (layer >= 0 && layer < config_.num_layers) {
    for (const VectorSlot& entry : kVectorSlots) {
      if (slot == entry.name) target = &(weights_.layers[layer].*entry.member);
    }
  }
  if (target == nullptr) fail(slot, layer, "no such vector");
  if (size != vector_size(config_, slot)) {
    fail(slot, layer,
         "has " + std::to_string(size) + " values, expected " +
             std::to_string(vector_size(config_, slot)));
  }
  target->assign(values, values + size);
}

void Model::load_matrix(const std::string& slot, int layer, const std::string& block_type,
                        const uint8_t* data, int64_t data_bytes, int64_t num_rows, int64_t num_cols,
                        const std::string& format, int interleaved_rope_heads) {
  Matrix* target = nullptr;
  if (slot == "embedding") target = &weights_.embedding;
  if (slot == "output") target = &weights_.output;
  if (config_.reads_hidden && slot == "input_projection") target = &weights_.input_projection;
  if (layer >= 0 && layer < config_.num_layers) {
    for (const MatrixSlot& entry : kMatrixSlots) {
      if (slot == entry.name) target = &(weights_.layers[layer].*entry.member);
    }
  }
  if (target == nullptr) fail(slot, layer, "no such matrix");
  auto [rows, cols] = matrix_shape(config_, slot);
  if (slot == "output" && !weights_.head_ids.empty()) rows = weights_.head_ids.size();
  if (num_rows != rows || num_cols != cols) {
    fail(slot, layer, "has shape " + shape(num_rows, num_cols) + ", expected " + shape(rows, cols));
  }
  BlockType type;
  if (!parse_block_type(block_type.c_str(), &type)) fail(slot, layer, "unknown type " + block_type);
  if (num_cols % block_values(type) != 0) {
    fail(slot, layer, std::to_string(num_cols) + " columns do not fill blocks of " + block_type);
  }
  const int64_t row_bytes = num_cols / block_values(type) * block_bytes(type);
  if (data_bytes != num_rows * row_bytes) {
    fail(slot, layer,
         "has " + std::to_string(data_bytes) + " bytes, expected " +
             std::to_string(num_rows * row_bytes));
  }
  if (interleaved_rope_heads > 0 && num_rows % interleaved_rope_heads != 0) {
    fail(slot, layer, "rows do not divide into heads");
  }

  const int N = static_cast<int>(num_rows), K = static_cast<int>(num_cols);
  const int head_dim = interleaved_rope_heads > 0 ? N / interleaved_rope_heads : 0;
  Matrix matrix;
  matrix.packed = {parse_format(format), N, K, nullptr};
  matrix.bytes = linear_->packed_bytes(matrix.packed.format, N, K);
  uint8_t* const memory = weights_.arena.take(matrix.bytes);
  const int channels = linear_->tile_channels(matrix.packed.format);
  TileRows tile(channels, K);
  for (int begin = 0; begin < N; begin += channels) {
    const int end = std::min(begin + channels, N);
    for (int row = begin; row < end; ++row) {
      const int64_t i = row - begin;
      const int64_t source = source_row(row, head_dim, interleaved_rope_heads > 0);
      quantize_row(matrix.packed.format, type, data + source * row_bytes, K, tile.scratch.data(),
                   tile.values.data() + i * K, tile.quants.data() + i * padded_k(K),
                   tile.scales.data() + i * num_groups(K), tile.minima.data() + i * num_groups(K));
    }
    linear_->pack(matrix.packed.format, N, K, begin, end, tile.values.data(), tile.quants.data(),
                  tile.scales.data(), tile.minima.data(), memory);
  }
  matrix.packed.data = memory;
  *target = matrix;
}

void Model::share_embedding(const Model& owner) {
  if (owner.config_.vocab_size != config_.vocab_size ||
      owner.config_.hidden_size != config_.hidden_size) {
    fail("embedding", -1, "has another shape in the model that it is shared with");
  }
  weights_.embedding = owner.weights_.embedding;
  weights_.embedding.bytes = 0;  // counted where it is loaded
  if (!weights_.output.loaded()) {
    weights_.output = owner.head();
    weights_.output.bytes = 0;
  }
}

void Model::set_head_ids(const int32_t* ids, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (ids[i] < 0 || ids[i] >= config_.vocab_size) fail("head_ids", -1, "lie outside V");
  }
  weights_.head_ids.assign(ids, ids + size);
}

void Model::finalize() {
  if (!weights_.embedding.loaded()) fail("embedding", -1, "is missing");
  if (weights_.final_norm.empty()) fail("final_norm", -1, "is missing");
  if (config_.reads_hidden) {
    if (weights_.embedding_norm.empty()) fail("embedding_norm", -1, "is missing");
    if (weights_.hidden_norm.empty()) fail("hidden_norm", -1, "is missing");
    if (!weights_.input_projection.loaded()) fail("input_projection", -1, "is missing");
  }
  if (!weights_.head_ids.empty() && head().packed.N != int(weights_.head_ids.size())) {
    fail("output", -1, "is missing: it has a row for each of the head's ids");
  }
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    const LayerWeights& w = weights_.layers[layer];
    for (const VectorSlot& entry : kVectorSlots) {
      if (entry.required && (w.*entry.member).empty()) fail(entry.name, layer, "is missing");
    }
    for (const MatrixSlot& entry : kMatrixSlots) {
      if (!(w.*entry.member).loaded()) fail(entry.name, layer, "is missing");
    }
  }
}

int64_t Model::weights_bytes() const {
  int64_t bytes =
      weights_.embedding.bytes + weights_.output.bytes + weights_.input_projection.bytes;
  for (const FloatVector* norm :
       {&weights_.final_norm, &weights_.embedding_norm, &weights_.hidden_norm}) {
    bytes += norm->size() * sizeof(float);
  }
  for (const LayerWeights& w : weights_.layers) {
    for (const MatrixSlot& entry : kMatrixSlots) bytes += (w.*entry.member).bytes;
    for (const VectorSlot& entry : kVectorSlots) {
      bytes += (w.*entry.member).size() * sizeof(float);
    }
  }
  return bytes;
}

void Model::allocate_kv(int num_blocks, KvDtype dtype) {
  if (num_blocks < 1) throw std::invalid_argument("the KV cache needs at least one block");
  pool_->wait_until_idle();
  kv_ = KvCache{};  // frees the former one first
  KvCache cache;
  cache.dtype = dtype;
  cache.num_layers = config_.num_layers;
  cache.num_kv_heads = config_.num_kv_heads;
  cache.head_dim = config_.head_dim;
  cache.num_blocks = num_blocks;
  cache.allocate();
  kv_ = std::move(cache);
  attend_ = vector_->attend(dtype);
  attend_segment_ = vector_->attend_segment(dtype);
  write_kv_ = vector_->write_kv(dtype);
}

void Model::populate_kv(int num_blocks) const {
  const int64_t groups =
      (std::min(num_blocks, kv_.num_blocks) + kBlocksTogether - 1) / kBlocksTogether;
  const int64_t bytes = groups * kv_.group_stride();
  for (int layer = 0; layer < kv_.num_layers; ++layer) {
    kv_.memory.populate(kv_.block(layer, 0, 0) - kv_.memory.data(), bytes);
  }
}

}  // namespace fulcrum
