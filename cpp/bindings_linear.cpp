// Python bindings of the linear layers, for tests and benchmarks: one packed matrix at a time, on
// one thread, for any instruction set that the machine runs. The serving path does not come here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "memory.h"
#include "quantize.h"

namespace fulcrum {
namespace {

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

BlockType block_type_of(const std::string& name) {
  BlockType type;
  if (!parse_block_type(name.c_str(), &type)) throw py::value_error("unknown block type " + name);
  return type;
}

const LinearKernels* kernels_of(const std::string& isa) {
  const LinearKernels* kernels = linear_kernels(isa.c_str());
  if (kernels == nullptr || !isa_supported(isa.c_str())) {
    throw py::value_error("instruction set " + isa + " is not available here");
  }
  return kernels;
}

void check_blocks(BlockType type, const ByteArray& data, int64_t num_values) {
  if (num_values < 0 || num_values % block_values(type) != 0 ||
      data.size() != num_values / block_values(type) * block_bytes(type)) {
    throw py::value_error("data does not hold num_values in whole blocks");
  }
}

// The int8 form of some rows, in memory of its own.
struct QuantizedRows {
  QuantizedRows(const LinearKernels* kernels, const FloatArray& x) {
    const int T = static_cast<int>(x.shape(0)), K = static_cast<int>(x.shape(1));
    quantized.resize(size_t(T) * padded_k(K));
    scales.resize(size_t(T) * num_groups(K));
    sums.resize(scales.size());
    totals.resize(scales.size());
    if (kernels->reads_widened) widened.resize(quantized.size());
    if (kernels->reads_rounded) rounded.resize(quantized.size());
    activations = {
        x.data(),      K,           quantized.data(), widened.empty() ? nullptr : widened.data(),
        scales.data(), sums.data(), totals.data(),    rounded.empty() ? nullptr : rounded.data()};
    kernels->quantize_rows(activations, K, 0, T);
  }
  std::vector<int8_t> quantized;
  std::vector<int16_t> widened;
  std::vector<uint16_t> rounded;
  std::vector<float> scales, sums, totals;
  Activations activations;
};

// A matrix of a checkpoint, quantized and packed.
class Linear {
 public:
  Linear(const std::string& isa, const std::string& format, const std::string& block_type,
         const ByteArray& data, int num_rows, int num_cols)
      : kernels_(kernels_of(isa)) {
    const Format f = parse_format(format);
    const BlockType type = block_type_of(block_type);
    if (num_rows < 1 || num_cols < 1 || num_cols % block_values(type) != 0) {
      throw py::value_error("num_rows and num_cols must be positive, num_cols in whole blocks");
    }
    check_blocks(type, data, int64_t{num_rows} * num_cols);
    memory_ = Buffer(kernels_->packed_bytes(f, num_rows, num_cols));
    matrix_ = {f, num_rows, num_cols, memory_.data()};
    pack(type, data.data());
  }

  py::array_t<float> dequantize() const {
    py::array_t<float> out({matrix_.N, matrix_.K});
    for (int n = 0; n < matrix_.N; ++n) kernels_->unpack_row(matrix_, n, out.mutable_data(n, 0));
    return out;
  }

  // Writes to `out`, (T, at least N), where one is given.
  FloatArray forward(const FloatArray& x, const py::object& given_out, bool accumulate,
                     int tile_begin, int tile_end) const {
    if (x.ndim() != 2 || x.shape(1) != matrix_.K) throw py::value_error("x must be (T, K)");
    const int end = tile_end < 0 ? num_tiles() : tile_end;
    if (tile_begin < 0 || end > num_tiles()) throw py::value_error("tile range out of bounds");
    const int T = static_cast<int>(x.shape(0));
    FloatArray out = given_out.is_none() ? zeros(T, matrix_.N) : checked_out(given_out, T);
    const QuantizedRows rows(kernels_, x);
    kernels_->gemm(matrix_, rows.activations, T, out.mutable_data(), out.shape(1), tile_begin, end,
                   accumulate);
    return out;
  }

  int num_tiles() const {
    const int channels = kernels_->tile_channels(matrix_.format);
    return (matrix_.N + channels - 1) / channels;
  }
  int tile_channels() const { return kernels_->tile_channels(matrix_.format); }
  size_t packed_bytes() const { return memory_.bytes(); }

 private:
  static FloatArray zeros(int rows, int cols) {
    FloatArray array({rows, cols});
    std::fill_n(array.mutable_data(), array.size(), 0.0f);
    return array;
  }

  FloatArray checked_out(const py::object& given, int T) const {
    if (!FloatArray::check_(given)) throw py::type_error("out must be C-contiguous float32");
    FloatArray out = py::reinterpret_borrow<FloatArray>(given);
    if (out.ndim() != 2 || out.shape(0) != T || out.shape(1) < matrix_.N) {
      throw py::value_error("out must be (T, at least N)");
    }
    return out;
  }

  // Tile by tile, as the threads of a model do it.
  void pack(BlockType type, const uint8_t* data) {
    const int K = matrix_.K, unit = tile_channels();
    const int64_t row_bytes = int64_t{K} / block_values(type) * block_bytes(type);
    std::vector<float> scratch(K), values(size_t(unit) * K), scales(size_t(unit) * num_groups(K)),
        minima(scales.size());
    std::vector<uint8_t> quants(size_t(unit) * padded_k(K));
    for (int begin = 0; begin < matrix_.N; begin += unit) {
      const int end = std::min(begin + unit, matrix_.N);
      for (int n = begin; n < end; ++n) {
        const size_t i = n - begin;
        quantize_row(matrix_.format, type, data + n * row_bytes, K, scratch.data(),
                     values.data() + i * K, quants.data() + i * padded_k(K),
                     scales.data() + i * num_groups(K), minima.data() + i * num_groups(K));
      }
      kernels_->pack(matrix_.format, matrix_.N, K, begin, end, values.data(), quants.data(),
                     scales.data(), minima.data(), memory_.data());
    }
  }

  const LinearKernels* kernels_;
  Buffer memory_;
  PackedMatrix matrix_;
};

py::array_t<float> dequantize_blocks(const std::string& block_type, const ByteArray& data,
                                     int64_t num_values) {
  const BlockType type = block_type_of(block_type);
  check_blocks(type, data, num_values);
  py::array_t<float> out(num_values);
  dequantize(type, data.data(), num_values, out.mutable_data());
  return out;
}

py::tuple quantize_activations(const std::string& isa, const FloatArray& x) {
  if (x.ndim() != 2) throw py::value_error("x must be (T, K)");
  const QuantizedRows rows(kernels_of(isa), x);
  const int64_t T = x.shape(0), groups = num_groups(static_cast<int>(x.shape(1)));
  return py::make_tuple(py::array_t<int8_t>({T, groups * kGroupSize}, rows.quantized.data()),
                        py::array_t<float>({T, groups}, rows.scales.data()),
                        py::array_t<float>({T, groups}, rows.sums.data()));
}

}  // namespace
}  // namespace fulcrum

void bind_linear(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace fulcrum;  // NOLINT: the anonymous names above
  m.def("dequantize", &dequantize_blocks, py::arg("block_type"), py::arg("data"),
        py::arg("num_values"));
  m.def("quantize_activations", &quantize_activations, py::arg("isa"), py::arg("x"));
  py::class_<Linear>(m, "Linear")
      .def(py::init<const std::string&, const std::string&, const std::string&, const ByteArray&,
                    int, int>(),
           py::arg("isa"), py::arg("format"), py::arg("block_type"), py::arg("data"),
           py::arg("num_rows"), py::arg("num_cols"))
      .def("dequantize", &Linear::dequantize)
      .def("forward", &Linear::forward, py::arg("x"), py::arg("out") = py::none(),
           py::arg("accumulate") = false, py::arg("tile_begin") = 0, py::arg("tile_end") = -1)
      .def_property_readonly("num_tiles", &Linear::num_tiles)
      .def_property_readonly("tile_channels", &Linear::tile_channels)
      .def_property_readonly("packed_bytes", &Linear::packed_bytes);
}
