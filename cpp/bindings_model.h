// What several files of bindings share: numpy buffers by name, and the model that is bound to some.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "model.h"

namespace fulcrum {

namespace py = pybind11;

[[noreturn]] inline void fail_buffer(const std::string& name, const std::string& what) {
  throw py::value_error("buffer " + name + ": " + what);
}

inline void require_size(int64_t size, int64_t least, const char* name) {
  if (size < least) fail_buffer(name, "is too short");
}

// Buffers by name, checked and kept alive while the model may touch them.
class BoundBuffers {
 public:
  void add(const std::string& name, py::array array) {
    if (!(array.flags() & py::array::c_style)) fail_buffer(name, "must be C-contiguous");
    arrays_[name] = std::move(array);
  }

  void remove(const std::string& name) { arrays_.erase(name); }

  // Fills `pointer` and returns the leading dimension; 0 where an optional buffer is absent.
  template <typename T>
  int64_t get(const std::string& name, const T** pointer, int64_t width = 0) const {
    return lookup<T>(name, const_cast<T**>(pointer), width, false);
  }
  template <typename T>
  int64_t get_writable(const std::string& name, T** pointer, int64_t width, bool optional) const {
    return lookup<T>(name, pointer, width, optional);
  }
  int64_t width(const std::string& name) const {
    const auto found = arrays_.find(name);
    return found == arrays_.end() || found->second.ndim() != 2 ? 0 : found->second.shape(1);
  }

 private:
  template <typename T>
  int64_t lookup(const std::string& name, T** pointer, int64_t width, bool optional) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) {
      if (optional) return 0;
      fail_buffer(name, "is missing");
    }
    const py::array& array = found->second;
    if (!py::isinstance<py::array_t<T>>(array)) fail_buffer(name, "has the wrong type");
    if (array.ndim() != (width > 0 ? 2 : 1))
      fail_buffer(name, "has the wrong number of dimensions");
    if (width > 0 && array.shape(1) != width) fail_buffer(name, "has the wrong width");
    *pointer = static_cast<T*>(const_cast<void*>(array.data()));
    return array.shape(0);
  }
  std::map<std::string, py::array> arrays_;
};

// A model and the arrays that it reads and writes.
class BoundModel {
 public:
  BoundModel(const Config& config, std::shared_ptr<ThreadPool> pool, const std::string& isa)
      : model(config, std::move(pool), isa) {}

  void bind(const py::kwargs& buffers) {
    BoundBuffers next = buffers_;
    // Another batch's hidden states and logits are not written on with this one's rows.
    if (buffers.contains("token_ids")) {
      next.remove("hidden");
      next.remove("logits");
    }
    for (const auto& [name, array] : buffers) {
      next.add(name.cast<std::string>(), array.cast<py::array>());
    }
    Batch batch;
    Limits limits;
    fill_step(next, &batch, &limits);
    fill_rows(next, &batch, &limits);
    model.bind(batch, limits);
    buffers_ = std::move(next);
  }

  Model model;

 private:
  static void require(int64_t size, int64_t least, const char* name) {
    require_size(size, least, name);
  }

  static void fill_step(const BoundBuffers& in, Batch* b, Limits* limits) {
    const int64_t T = in.get("token_ids", &b->token_ids);
    require(in.get("positions", &b->positions), T, "positions");
    require(in.get("slot_mapping", &b->slot_mapping), T, "slot_mapping");
    const int64_t S = in.get("seq_lens", &b->seq_lens);
    require(in.get("query_start", &b->query_start), S + 1, "query_start");
    const int64_t M = in.width("block_table");
    if (M == 0) fail_buffer("block_table", "must be (sequences, blocks)");
    require(in.get("block_table", &b->block_table, M), S, "block_table");
    limits->max_tokens = static_cast<int>(T);
    limits->max_sequences = static_cast<int>(S);
    limits->max_blocks_per_seq = static_cast<int>(M);
    limits->max_rows = static_cast<int>(in.get("logits_rows", &b->logits_rows));
  }

  void fill_rows(const BoundBuffers& in, Batch* b, Limits* limits) const {
    const int64_t R = limits->max_rows;
    const auto row = [&](const char* name, auto** pointer) {
      require(in.get(name, pointer), R, name);
    };
    row("target_ids", &b->target_ids);
    row("temperature", &b->temperature);
    row("top_p", &b->top_p);
    row("min_p", &b->min_p);
    row("repetition_penalty", &b->repetition_penalty);
    row("presence_penalty", &b->presence_penalty);
    row("frequency_penalty", &b->frequency_penalty);
    row("top_k", &b->top_k);
    row("num_logprobs", &b->num_logprobs);
    row("seed", &b->seed);
    row("noise_position", &b->noise_position);
    row("history_start", &b->history_start);
    row("history_output_start", &b->history_output_start);
    row("history_end", &b->history_end);
    require(in.get("bias_start", &b->bias_start), R + 1, "bias_start");
    limits->history_ids = in.get("history_ids", &b->history_ids);
    limits->bias_ids = in.get("bias_ids", &b->bias_ids);
    require(in.get("bias_values", &b->bias_values), limits->bias_ids, "bias_values");
    require(in.get_writable("sampled_ids", &b->sampled_ids, 0, false), R, "sampled_ids");
    require(in.get_writable("sampled_logprobs", &b->sampled_logprobs, 0, false), R,
            "sampled_logprobs");
    require(in.get_writable("top_ids", &b->top_ids, kMaxLogprobs, false), R, "top_ids");
    require(in.get_writable("top_logprobs", &b->top_logprobs, kMaxLogprobs, false), R,
            "top_logprobs");
    limits->logits_rows = in.get_writable("logits", &b->logits, model.config().vocab_size, true);
    limits->hidden_rows = in.get_writable("hidden", &b->hidden, model.config().hidden_size, true);
    if (b->hidden != nullptr) {
      require(in.get("hidden_rows", &b->hidden_rows), limits->max_tokens, "hidden_rows");
    }
  }

  BoundBuffers buffers_;
};

}  // namespace fulcrum
