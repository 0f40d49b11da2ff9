// The operations of ops.h one by one, for the tests that compare instruction sets.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "isa.h"
#include "kv_cache.h"
#include "ops.h"

namespace py = pybind11;

namespace fulcrum {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

const VectorKernels& kernels(const std::string& isa) {
  const VectorKernels* table = vector_kernels(isa.c_str());
  if (table == nullptr || !isa_supported(isa.c_str())) {
    throw py::value_error("instruction set " + isa + " is not available on this machine");
  }
  return *table;
}

Floats like(const Floats& x) {
  return Floats(std::vector<ssize_t>(x.shape(), x.shape() + x.ndim()));
}

Floats rms_norm(const std::string& isa, const Floats& x, const Floats& weight, float eps) {
  Floats out = like(x);
  kernels(isa).rms_norm(x.data(), weight.data(), eps, static_cast<int>(x.size()),
                        out.mutable_data());
  return out;
}

Floats gate(const std::string& isa, const std::string& activation, const Floats& gate,
            const Floats& up) {
  Floats out = like(gate);
  const Activation kind = activation == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  kernels(isa).gate(kind, gate.data(), up.data(), static_cast<int>(gate.size()),
                    out.mutable_data());
  return out;
}

Floats rotate(const std::string& isa, const Floats& head, const Floats& cos, const Floats& sin) {
  Floats out = like(head);
  std::copy_n(head.data(), head.size(), out.mutable_data());
  kernels(isa).rotate(out.mutable_data(), cos.data(), sin.data(), static_cast<int>(head.size()));
  return out;
}

void attend_segments_apart(const VectorKernels& kernels, KvDtype dtype, const AttentionUnit& unit,
                           float* scratch) {
  const SegmentRange range = attention_segments(unit.first_position, unit.num_tokens, unit.window);
  const int64_t floats = attention_state_floats(unit.num_tokens * unit.num_heads, unit.head_dim);
  std::vector<float> states((range.end - range.begin) * floats);
  for (int segment = range.end - 1; segment >= range.begin; --segment) {
    kernels.attend_segment(dtype)(unit, segment, scratch,
                                  states.data() + (segment - range.begin) * floats);
  }
  kernels.merge_segments(unit, states.data(), range.end - range.begin, scratch);
}

// queries (T, H, HD) are the last T of the S tokens whose keys and values (S, KH, HD) are given;
// they are written to the blocks of block_table first. tile_tokens queries are computed at a time,
// their segments apart, last first, where asked for.
Floats attend(const std::string& isa, const Floats& queries, const Floats& keys,
              const Floats& values, const Ints& block_table, int window, int tile_tokens,
              const std::string& kv_dtype, bool segments_apart) {
  const int T = static_cast<int>(queries.shape(0)), H = static_cast<int>(queries.shape(1));
  const int HD = static_cast<int>(queries.shape(2));
  const int S = static_cast<int>(keys.shape(0)), KH = static_cast<int>(keys.shape(1));
  const int group = H / KH;
  if (tile_tokens > kMaxTileTokens || tile_tokens * group > kMaxTileRows) {
    throw py::value_error("tile too large");
  }
  KvCache cache;
  cache.dtype = parse_kv_dtype(kv_dtype);
  cache.num_layers = 1;
  cache.num_kv_heads = KH;
  cache.head_dim = HD;
  cache.num_blocks =
      *std::max_element(block_table.data(), block_table.data() + block_table.size()) + 1;
  cache.allocate();
  for (int s = 0; s < S; ++s) {
    const int64_t block = block_table.at(s / kBlockSize);
    for (int head = 0; head < KH; ++head) {
      kernels(isa).write_kv(cache.dtype)(keys.data(s, head), values.data(s, head), HD,
                                         s % kBlockSize, cache.block(0, block, head));
    }
  }
  Floats out = like(queries);
  std::vector<float> scratch(attention_scratch_floats(HD));
  for (int t = 0; t < T; t += tile_tokens) {
    for (int head = 0; head < KH; ++head) {
      AttentionUnit unit;
      unit.queries = queries.data(t, head * group);
      unit.out = out.mutable_data(t, head * group);
      unit.ld_queries = unit.ld_out = int64_t{H} * HD;
      unit.num_tokens = std::min(tile_tokens, T - t);
      unit.num_heads = group;
      unit.head_dim = HD;
      unit.first_position = S - T + t;
      unit.window = window;
      unit.block_table = block_table.data();
      unit.kv = cache.block(0, 0, head);
      unit.block_stride = cache.block_stride();
      unit.group_stride = cache.group_stride();
      if (segments_apart) {
        attend_segments_apart(kernels(isa), cache.dtype, unit, scratch.data());
      } else {
        kernels(isa).attend(cache.dtype)(unit, scratch.data());
      }
    }
  }
  return out;
}

}  // namespace
}  // namespace fulcrum

void bind_ops(py::module_& m) {
  using namespace fulcrum;
  m.def("rms_norm", &rms_norm, py::arg("isa"), py::arg("x"), py::arg("weight"), py::arg("eps"));
  m.def("gate", &gate, py::arg("isa"), py::arg("activation"), py::arg("gate"), py::arg("up"));
  m.def("rotate", &rotate, py::arg("isa"), py::arg("head"), py::arg("cos"), py::arg("sin"));
  m.def("attend", &attend, py::arg("isa"), py::arg("queries"), py::arg("keys"), py::arg("values"),
        py::arg("block_table"), py::arg("window"), py::arg("tile_tokens"),
        py::arg("kv_dtype") = "bf16", py::arg("segments_apart") = false);
}
