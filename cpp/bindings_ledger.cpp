// Python bindings of what a model will take of the memory, known before anything is loaded: by the
// same functions that allocate it.
#include <pybind11/pybind11.h>

#include <string>

#include "model.h"

namespace py = pybind11;

void bind_ledger(py::module_& m) {
  using namespace fulcrum;  // NOLINT: only this function's
  m.attr("BLOCK_SIZE") = kBlockSize;
  m.def(
      "kv_block_bytes",
      [](const Config& c, const std::string& dtype) {
        return KvCache::block_bytes(parse_kv_dtype(dtype), c.num_layers, c.num_kv_heads,
                                    c.head_dim);
      },
      py::arg("config"), py::arg("dtype"));
  m.def(
      "activation_bytes",
      [](const Config& config, const std::string& isa, int num_threads, int max_tokens,
         int max_blocks_per_seq) {
        return Model::activation_bytes(config, isa, num_threads, max_tokens, max_blocks_per_seq);
      },
      py::arg("config"), py::arg("isa"), py::arg("num_threads"), py::arg("max_tokens"),
      py::arg("max_blocks_per_seq"));
}
