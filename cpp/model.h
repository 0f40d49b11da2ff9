// A decoder-only transformer: Config, Weights and the forward pass over layers, written once for
// all families. The bindings own one Model; one thread at a time drives it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "batch.h"
#include "kv_cache.h"
#include "linear.h"
#include "memory.h"
#include "ops.h"
#include "sampler.h"
#include "thread_pool.h"

namespace fulcrum {

struct Config {
  int num_layers = 0;
  int hidden_size = 0;        // D
  int intermediate_size = 0;  // I
  int num_heads = 0;          // H
  int num_kv_heads = 0;       // KH
  int head_dim = 0;           // HD, a multiple of 16
  int vocab_size = 0;         // V
  float norm_eps = 1e-5f;
  Activation activation = Activation::kSilu;
  float attention_scale = 0;  // multiplies q · k
  float embedding_scale = 1;
  std::vector<int> layer_windows;                 // (num_layers,) tokens seen; 0: all
  std::vector<int> layer_rope_index;              // (num_layers,) row of rope_inv_freq
  std::vector<std::vector<float>> rope_inv_freq;  // (tables, HD / 2)
  float rope_attention_factor = 1;                // multiplies cos and sin
  // A multi-token-prediction module: a token's input is a projection of its embedding and of the
  // hidden state before it (DeepSeek-V3 Technical Report, section 2.2).
  bool reads_hidden = false;
  // Whether such a module goes on from its own output after the final norm, not before it.
  bool chains_normed = false;

  int qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int attention_size() const { return num_heads * head_dim; }
};

// A packed matrix in the weights' arena.
struct Matrix {
  PackedMatrix packed;
  size_t bytes = 0;
  bool loaded() const { return packed.data != nullptr; }
};

using FloatVector = std::vector<float>;  // empty where the family has none

struct LayerWeights {
  FloatVector attention_norm;       // (D,)
  FloatVector q_norm, k_norm;       // (HD,), optional
  FloatVector attention_post_norm;  // (D,), optional
  FloatVector mlp_norm;             // (D,)
  FloatVector mlp_post_norm;        // (D,), optional
  FloatVector q_bias;               // (H * HD,), optional
  FloatVector k_bias, v_bias;       // (KH * HD,), optional
  Matrix q, k, v;                   // (H * HD, D), (KH * HD, D), (KH * HD, D)
  Matrix attention_output;          // (D, H * HD)
  Matrix gate, up;                  // (I, D)
  Matrix down;                      // (D, I)
};

struct Weights {
  Arena arena;
  Matrix embedding;               // (V, D)
  Matrix output;                  // (V, D), absent where the embedding is the head; or, for a head
                                  // over some tokens only, (head_ids, D)
  std::vector<int32_t> head_ids;  // the tokens of `output`'s rows; empty: all, in order
  FloatVector final_norm;         // (D,)
  FloatVector embedding_norm;     // (D,), where hidden states are read, and so the next two
  FloatVector hidden_norm;        // (D,)
  Matrix input_projection;        // (D, 2 D): embedding, then hidden state
  std::vector<LayerWeights> layers;
};

// The input of a linear layer, in the forms that its formats want.
struct Operand {
  float* normed = nullptr;      // (rows, D), or (rows, 2 D) where hidden states are read
  int8_t* quantized = nullptr;  // (rows, widest padded K)
  int16_t* widened = nullptr;   // (rows, widest padded K), where the kernels want it
  float* scales = nullptr;      // (rows, groups)
  float* sums = nullptr;        // (rows, groups)
  float* totals = nullptr;      // (rows, groups)
  uint16_t* rounded = nullptr;  // (rows, widest padded K), where the kernels want it

  // Of these rows; their other forms, once they are filled, lie here.
  Activations activations(const float* values, int64_t ld_values) const {
    return {values, ld_values, quantized, widened, scales, sums, totals, rounded};
  }
};

// Activations of a step, allocated when the batch's capacity is known.
struct RunState {
  Buffer memory;
  float* hidden = nullptr;                      // (T, D) the residual stream
  float* qkv = nullptr;                         // (T, (H + 2 KH) HD)
  float* attention = nullptr;                   // (T, H HD)
  float* mlp = nullptr;                         // (T, I) what `down` reads, unless quantized
  std::vector<float*> gate_up;                  // one a thread, some rows and channels
  float* branch = nullptr;                      // (T, D) a branch's output before its post norm
  float* cos = nullptr;                         // (tables, T, HD / 2)
  float* sin = nullptr;                         // (tables, T, HD / 2)
  float* logits = nullptr;                      // (kLogitsChunk, V)
  Operand shared;                               // T rows
  Operand gated;                                // T rows: what `down` reads, normed unused
  std::vector<Operand> own;                     // one a thread, kReplicatedRows rows
  std::vector<Buffer> attention_scratch;        // one a thread
  std::vector<SamplerScratch> sampler_scratch;  // one a thread
};

// Floats of gate and up that a thread holds before they are one.
int64_t gate_up_floats(const Config& config);

// Steps of so few rows norm and quantize them on every thread, each for itself: cheaper than to
// share the work and wait for each other.
constexpr int kReplicatedRows = 2;

// Of the last layer only the rows that somebody reads are completed, where that spares so many.
constexpr int kLeastSpared = 16;

// Rows of logits that are held at a time: enough to read the head's weights once for all decoding
// sequences of a usual step, few enough that a vocabulary of 262144 stays at 32 MiB.
constexpr int kLogitsChunk = 32;

// Attention over few tiles is shared by segments of their keys: a long sequence that decodes alone
// would leave threads without a KV head. Only tiles of so few rows, and so many a thread at most.
constexpr int kMaxPartRows = 16;
constexpr int kMaxPartedUnits = 4;

class Model final : private ThreadPool::Job {
 public:
  // Models that share a pool are driven by the same thread, one after the other. Throws
  // std::invalid_argument where the shape or the instruction set cannot be computed here.
  Model(const Config& config, std::shared_ptr<ThreadPool> pool, const std::string& isa);
  ~Model() { pool_->wait_until_idle(); }

  // Both may be called from several threads at once, for different slots.
  void load_vector(const std::string& slot, int layer, const float* values, int64_t size);
  void load_matrix(const std::string& slot, int layer, const std::string& block_type,
                   const uint8_t* data, int64_t data_bytes, int64_t num_rows, int64_t num_cols,
                   const std::string& format, int interleaved_rope_heads);

  // Takes the embedding of another model, which outlives this one, and its head where this one
  // has none. Throws std::invalid_argument where the shapes differ.
  void share_embedding(const Model& owner);

  // The tokens that the rows of `output` stand for, before it is loaded.
  void set_head_ids(const int32_t* ids, int64_t size);

  // Throws std::invalid_argument naming the first slot that is missing.
  void finalize();

  void allocate_kv(int num_blocks, KvDtype dtype);

  // Gives the first blocks their memory before prompts have to wait for it.
  void populate_kv(int num_blocks) const;

  // Sets the buffers of the next steps and allocates the activations for them.
  void bind(const Batch& batch, const Limits& limits);

  // Where the next steps read hidden states from.
  void set_previous_hidden(const float* rows) { batch_.previous_hidden = rows; }

  // Computes the step and samples its rows. Throws std::invalid_argument where the batch would
  // read or write outside of what is bound, before anything is computed.
  void step(int num_tokens, int num_sequences, int num_rows);

  // Bytes that bind() allocates for such a model and batch, known before anything is loaded.
  static int64_t activation_bytes(const Config& config, const std::string& isa, int num_threads,
                                  int max_tokens, int max_blocks_per_seq);
  int64_t activation_bytes() const;  // allocated now

  const Config& config() const { return config_; }
  // The residual stream of the last step, (T, D): what a module that reads hidden states is given
  // when it goes on from its own output. Complete for rows that needed logits.
  const float* residual_stream() const { return state_.hidden; }
  int num_threads() const { return pool_->num_threads(); }
  const char* isa() const { return linear_->isa; }
  const std::shared_ptr<ThreadPool>& pool() const { return pool_; }
  int num_kv_blocks() const { return kv_.num_blocks; }
  KvDtype kv_dtype() const { return kv_.dtype; }
  int64_t weights_bytes() const;
  int64_t kv_bytes_per_block(KvDtype dtype) const {
    return KvCache::block_bytes(dtype, config_.num_layers, config_.num_kv_heads, config_.head_dim);
  }

 private:
  // A thread may still be on its way through a step when the next one is planned: what decides the
  // number of operations is therefore here, and never read from the plan itself.
  struct Step {
    int num_tokens, num_sequences, num_rows;
    int num_tiles, num_parts;  // of attention; no parts: tiles are computed whole
    int num_kept;              // rows that the last layer completes
  };

  // A query tile of one sequence, for all KV heads.
  struct Tile {
    int sequence, first_token, num_tokens;
    bool is_kept;  // whether the last layer completes one of its rows
  };

  // One segment of a tile's keys, for one KV head; those of a tile and head lie together.
  struct AttentionPart {
    int tile, kv_head, segment;
  };

  RunState make_state(int max_tokens) const;
  void check(const Step& step) const;
  void plan_kept(Step* step);
  void plan_tiles(Step* step);
  void plan_parts(Step* step);
  void run_thread(int thread, const ThreadPool::Arguments& sizes) override;
  void embed(const Step& step, int thread);
  void embed_token(int t, float* row);
  void rotate_positions(int t);
  void rotate_and_cache(const Step& step, int layer, int thread);
  void attend(const Step& step, int layer, int thread);
  void attend_parts(const Step& step, int layer, int thread);
  AttentionUnit attention_unit(const Tile& tile, int layer, int kv_head) const;
  void mix(const Step& step, int layer, int thread);
  void transform(const Step& step, int layer, int thread);
  bool is_cut(const Step& step, int layer) const {
    return layer == config_.num_layers - 1 && step.num_kept < step.num_tokens;
  }
  void transform_kept(const Step& step, int layer, int thread);
  void gate_up(const Step& step, int layer, int thread, const Activations& x);
  void gate_up_groups(int layer, int thread, const Activations& x, int first, int end, int t,
                      int t_end);
  const Matrix& head() const {
    return weights_.output.loaded() ? weights_.output : weights_.embedding;
  }
  void norm_final(int64_t t, float* out);
  void sample(const Step& step, int thread);
  void sample_one(int row, float* logits, int thread);

  // Calls op(unit) for every unit, the units shared among the threads.
  template <typename Op>
  void for_units(int thread, int num_units, Op op);
  bool needs_prepared(const Matrix& w) const;
  bool replicates(const Step& step) const { return step.num_tokens <= kReplicatedRows; }
  Activations norm_rows(const Step& step, const FloatVector& weight, const FloatVector& post_norm,
                        int thread);
  Activations quantize_attention(const Step& step, const Matrix& w, int thread);
  void multiply(int thread, std::initializer_list<const Matrix*> parts, const Activations& x,
                int num_rows, float* y, int64_t ld_y, bool accumulate);
  void residual(int thread, const Matrix& w, const Activations& x, const Step& step,
                bool has_post_norm);

  Config config_;
  const LinearKernels* linear_;
  const VectorKernels* vector_;
  Weights weights_;
  KvCache kv_;
  VectorKernels::Attend attend_ = nullptr;  // of the cache's dtype, as the next
  VectorKernels::AttendSegment attend_segment_ = nullptr;
  VectorKernels::WriteKv write_kv_ = nullptr;
  Batch batch_;
  Limits limits_;
  RunState state_;
  std::vector<int> kept_rows_;  // ascending
  std::vector<Tile> tiles_;
  std::vector<AttentionPart> parts_;  // empty where the tiles are shared whole
  Buffer attention_states_;           // a state of kMaxPartRows a part
  std::shared_ptr<ThreadPool> pool_;
};

template <typename Op>
void Model::for_units(int thread, int num_units, Op op) {
  pool_->share(thread, num_units, [&](int begin, int end) {
    for (int unit = begin; unit < end; ++unit) op(unit);
  });
}

}  // namespace fulcrum
