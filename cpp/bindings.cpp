// The module `fulcrum_core`: Model over numpy buffers, and what the other bindings add.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings_model.h"
#include "isa.h"

namespace py = pybind11;

void bind_bench(py::module_& m);
void bind_draft(py::module_& m);
void bind_ledger(py::module_& m);
void bind_linear(py::module_& m);
void bind_ngram(py::module_& m);
void bind_ops(py::module_& m);
void bind_sampler(py::module_& m);
void bind_tokenizer(py::module_& m);

namespace fulcrum {
namespace {

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
      .def_readwrite("rope_attention_factor", &Config::rope_attention_factor)
      .def_readwrite("reads_hidden", &Config::reads_hidden)
      .def_readwrite("chains_normed", &Config::chains_normed);
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

void bind_model(py::module_& m) {
  py::class_<BoundModel>(m, "Model")
      .def(py::init([](const Config& config, int num_threads, const std::string& isa) {
             return new BoundModel(config, std::make_shared<ThreadPool>(num_threads), isa);
           }),
           py::arg("config"), py::arg("num_threads"), py::arg("isa"))
      .def(py::init([](const Config& config, const BoundModel& target) {
             return new BoundModel(config, target.model.pool(), target.model.isa());
           }),
           py::arg("config"), py::arg("drafts_for"))
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
      .def(
          "share_embedding",
          [](BoundModel& self, const BoundModel& owner) {
            self.model.share_embedding(owner.model);
          },
          py::arg("owner"), py::keep_alive<1, 2>())
      .def(
          "set_head_ids",
          [](BoundModel& self, const py::array_t<int32_t, py::array::c_style>& ids) {
            self.model.set_head_ids(ids.data(), ids.size());
          },
          py::arg("ids"))
      .def("finalize", [](BoundModel& self) { self.model.finalize(); })
      .def(
          "allocate_kv",
          [](BoundModel& self, int num_blocks, const std::optional<std::string>& dtype) {
            self.model.allocate_kv(num_blocks,
                                   dtype ? parse_kv_dtype(*dtype) : self.model.kv_dtype());
          },
          py::arg("num_blocks"), py::arg("dtype") = py::none())
      .def(
          "populate_kv",
          [](const BoundModel& self, int num_blocks) { self.model.populate_kv(num_blocks); },
          py::arg("num_blocks"), py::call_guard<py::gil_scoped_release>())
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
  m.def("isas", [] {
    return std::vector<std::string>(std::begin(fulcrum::kIsas), std::end(fulcrum::kIsas));
  });
  m.def("detect_isa", &fulcrum::detect_isa);
  fulcrum::bind_config(m);
  fulcrum::bind_model(m);
  bind_bench(m);
  bind_draft(m);
  bind_ledger(m);
  bind_linear(m);
  bind_ngram(m);
  bind_ops(m);
  bind_sampler(m);
  bind_tokenizer(m);
}
