// Python binding of the sampler alone, for its tests; the serving path goes through Model::step.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "sampler.h"

namespace py = pybind11;

namespace fulcrum {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Samples len(seeds) rows with common parameters, row i from logits[i % len(logits)] with
// seeds[i] and noise_positions[i].
py::dict sample_rows(Array<float> logits, Array<uint64_t> seeds, Array<int32_t> noise_positions,
                     float temperature, int32_t top_k, float top_p, float min_p,
                     float repetition_penalty, float presence_penalty, float frequency_penalty,
                     Array<int32_t> history_ids, int32_t output_start, Array<int32_t> bias_ids,
                     Array<float> bias_values, int32_t target_id, int32_t num_logprobs) {
  if (logits.ndim() != 2 || logits.shape(0) < 1 || logits.shape(1) < 1) {
    throw std::invalid_argument("logits must have shape (rows, V)");
  }
  if (seeds.size() != noise_positions.size() || bias_ids.size() != bias_values.size()) {
    throw std::invalid_argument("seeds and noise_positions, bias_ids and bias_values: one length");
  }
  const int V = static_cast<int>(logits.shape(1));
  const py::ssize_t num_rows = seeds.size();
  py::array_t<int32_t> ids(num_rows), top_ids({num_rows, py::ssize_t{kMaxLogprobs}});
  py::array_t<float> logprobs(num_rows), top_logprobs({num_rows, py::ssize_t{kMaxLogprobs}});
  std::vector<std::string> errors(num_rows);

  RowParams p{.temperature = temperature,
              .top_p = top_p,
              .min_p = min_p,
              .repetition_penalty = repetition_penalty,
              .presence_penalty = presence_penalty,
              .frequency_penalty = frequency_penalty,
              .top_k = top_k,
              .target_id = target_id,
              .num_logprobs = num_logprobs};
  p.history_ids = history_ids.data();
  p.history_size = static_cast<int32_t>(history_ids.size());
  p.output_start = output_start;
  p.bias_ids = bias_ids.data();
  p.bias_values = bias_values.data();
  p.bias_size = static_cast<int32_t>(bias_ids.size());
  SamplerScratch scratch(V);
  std::vector<float> row(V);
  for (py::ssize_t i = 0; i < num_rows; ++i) {
    const float* source = logits.data(i % logits.shape(0), 0);
    row.assign(source, source + V);
    p.seed = seeds.data()[i];
    p.noise_position = noise_positions.data()[i];
    RowResult result;
    sample_row(p, row.data(), V, scratch, &result);
    ids.mutable_data()[i] = result.id;
    logprobs.mutable_data()[i] = result.logprob;
    std::copy_n(result.top_ids, kMaxLogprobs, top_ids.mutable_data(i, 0));
    std::copy_n(result.top_logprobs, kMaxLogprobs, top_logprobs.mutable_data(i, 0));
    if (result.error != RowError::kNone) errors[i] = describe(result.error);
  }
  py::dict out;
  out["ids"] = ids;
  out["logprobs"] = logprobs;
  out["top_ids"] = top_ids;
  out["top_logprobs"] = top_logprobs;
  out["errors"] = errors;
  return out;
}

}  // namespace
}  // namespace fulcrum

void bind_sampler(py::module_& m) {
  using namespace fulcrum;
  m.def("sample_rows", &sample_rows, py::arg("logits"), py::arg("seeds"),
        py::arg("noise_positions"), py::kw_only(), py::arg("temperature") = 1.0f,
        py::arg("top_k") = 0, py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f,
        py::arg("repetition_penalty") = 1.0f, py::arg("presence_penalty") = 0.0f,
        py::arg("frequency_penalty") = 0.0f, py::arg("history_ids") = Array<int32_t>(0),
        py::arg("output_start") = 0, py::arg("bias_ids") = Array<int32_t>(0),
        py::arg("bias_values") = Array<float>(0), py::arg("target_id") = -1,
        py::arg("num_logprobs") = -1,
        "Sample len(seeds) rows, row i from logits[i % len(logits)]; for tests.");
}
