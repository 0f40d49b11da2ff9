// The module `fulcrum_core`: Model over numpy buffers, and what the other bindings add.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>

#include "isa.h"
#include "model.h"

namespace py = pybind11;

void bind_bench(py::module_& m);
void bind_ledger(py::module_& m);
void bind_linear(py::module_& m);
void bind_ops(py::module_& m);
void bind_sampler(py::module_& m);
void bind_tokenizer(py::module_& m);

namespace fulcrum {
namespace {

[[noreturn]] void fail(const std::string& name, const std::string& what) {
  throw py::value_error("buffer " + name + ": " + what);
}

// The buffers of a step, by name, checked and kept alive while the model may touch them.
class BoundBuffers {
 public:
  void add(const std::string& name, py::array array) {
    if (!(array.flags() & py::array::c_style)) fail(name, "must be C-contiguous");
    arrays_[name] = std::move(array);
  }

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
      fail(name, "is missing");
    }
    const py::array& array = found->second;
    if (!py::isinstance<py::array_t<T>>(array)) fail(name, "has the wrong type");
    if (array.ndim() != (width > 0 ? 2 : 1)) fail(name, "has the wrong number of dimensions");
    if (width > 0 && array.shape(1) != width) fail(name, "has the wrong width");
    *pointer = static_cast<T*>(const_cast<void*>(array.data()));
    return array.shape(0);
  }
  std::map<std::string, py::array> arrays_;
};

// A model and the arrays that it reads and writes.
class BoundModel {
 public:
  BoundModel(const Config& config, int num_threads, const std::string& isa)
      : model(config, num_threads, isa) {}

  void bind(const py::kwargs& buffers) {
    BoundBuffers next = buffers_;
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
    if (size < least) fail(name, "is too short");
  }

  static void fill_step(const BoundBuffers& in, Batch* b, Limits* limits) {
    const int64_t T = in.get("token_ids", &b->token_ids);
    require(in.get("positions", &b->positions), T, "positions");
    require(in.get("slot_mapping", &b->slot_mapping), T, "slot_mapping");
    const int64_t S = in.get("seq_lens", &b->seq_lens);
    require(in.get("query_start", &b->query_start), S + 1, "query_start");
    const int64_t M = in.width("block_table");
    if (M == 0) fail("block_table", "must be (sequences, blocks)");
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
  }

  BoundBuffers buffers_;
};

void set_activation(Config& config, const std::string& name) {
  if (name == "silu") {
    config.activation = Activation::kSilu;
  } else if (name == "gelu_tanh") {
    config.activation = Activation::kGeluTanh;
  } else {
    throw py::value_error("unknown activation " + name);
  }
}

void bind_config(py::module_& m) {
  py::class_<Config>(m, "Config")
      .def(py::init<>())
      .def_readwrite("num_layers", &Config::num_layers)
      .def_readwrite("hidden_size", &Config::hidden_size)
      .def_readwrite("intermediate_size", &Config::intermediate_size)
      .def_readwrite("num_heads", &Config::num_heads)
      .def_readwrite("num_kv_heads", &Config::num_kv_heads)
      .def_readwrite("head_dim", &Config::head_dim)
      .def_readwrite("vocab_size", &Config::vocab_size)
      .def_readwrite("norm_eps", &Config::norm_eps)
      .def_property(
          "activation",
          [](const Config& c) { return c.activation == Activation::kSilu ? "silu" : "gelu_tanh"; },
          &set_activation)
      .def_readwrite("attention_scale", &Config::attention_scale)
      .def_readwrite("embedding_scale", &Config::embedding_scale)
      .def_readwrite("layer_windows", &Config::layer_windows)
      .def_readwrite("layer_rope_index", &Config::layer_rope_index)
      .def_readwrite("rope_inv_freq", &Config::rope_inv_freq)
      .def_readwrite("rope_attention_factor", &Config::rope_attention_factor);
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

void bind_model(py::module_& m) {
  py::class_<BoundModel>(m, "Model")
      .def(py::init<const Config&, int, const std::string&>(), py::arg("config"),
           py::arg("num_threads"), py::arg("isa"))
      .def(
          "load_vector",
          [](BoundModel& self, const std::string& slot, int layer, const FloatArray& values) {
            self.model.load_vector(slot, layer, values.data(), values.size());
          },
          py::arg("slot"), py::arg("layer"), py::arg("values"))
      .def(
          "load_matrix",
          [](BoundModel& self, const std::string& slot, int layer, const std::string& block_type,
             const ByteArray& data, int64_t num_rows, int64_t num_cols, const std::string& format,
             int interleaved_rope_heads) {
            const uint8_t* bytes = data.data();
            const int64_t num_bytes = data.size();
            py::gil_scoped_release release;
            self.model.load_matrix(slot, layer, block_type, bytes, num_bytes, num_rows, num_cols,
                                   format, interleaved_rope_heads);
          },
          py::arg("slot"), py::arg("layer"), py::arg("block_type"), py::arg("data"),
          py::arg("num_rows"), py::arg("num_cols"), py::arg("format"),
          py::arg("interleaved_rope_heads") = 0)
      .def("finalize", [](BoundModel& self) { self.model.finalize(); })
      .def(
          "allocate_kv",
          [](BoundModel& self, int num_blocks, const std::optional<std::string>& dtype) {
            self.model.allocate_kv(num_blocks,
                                   dtype ? parse_kv_dtype(*dtype) : self.model.kv_dtype());
          },
          py::arg("num_blocks"), py::arg("dtype") = py::none())
      .def(
          "kv_block_bytes",
          [](const BoundModel& self, const std::string& dtype) {
            return self.model.kv_bytes_per_block(parse_kv_dtype(dtype));
          },
          py::arg("dtype"))
      .def("bind", [](BoundModel& self, const py::kwargs& buffers) { self.bind(buffers); })
      .def(
          "step",
          [](BoundModel& self, int num_tokens, int num_sequences, int num_rows) {
            py::gil_scoped_release release;
            self.model.step(num_tokens, num_sequences, num_rows);
          },
          py::arg("num_tokens"), py::arg("num_sequences"), py::arg("num_rows"))
      .def_property_readonly("block_size", [](const BoundModel&) { return kBlockSize; })
      .def_property_readonly("kv_bytes_per_block",
                             [](const BoundModel& self) {
                               return self.model.kv_bytes_per_block(self.model.kv_dtype());
                             })
      .def_property_readonly("kv_dtype",
                             [](const BoundModel& self) {
                               return self.model.kv_dtype() == KvDtype::kBf16 ? "bf16" : "int8";
                             })
      .def_property_readonly("weights_bytes",
                             [](const BoundModel& self) { return self.model.weights_bytes(); })
      .def_property_readonly("activation_bytes",
                             [](const BoundModel& self) { return self.model.activation_bytes(); })
      .def_property_readonly("num_threads",
                             [](const BoundModel& self) { return self.model.num_threads(); })
      .def_property_readonly("isa", [](const BoundModel& self) { return self.model.isa(); });
}

}  // namespace
}  // namespace fulcrum

PYBIND11_MODULE(fulcrum_core, m) {
  m.doc() = "Fulcrum's core: computes the step.";
  m.def("detect_isa", &fulcrum::detect_isa);
  fulcrum::bind_config(m);
  fulcrum::bind_model(m);
  bind_bench(m);
  bind_ledger(m);
  bind_linear(m);
  bind_ops(m);
  bind_sampler(m);
  bind_tokenizer(m);
}
