// Binds ngram.h for engine/speculation/ngram.py: one call for all sequences of a step. Called
// once, by bindings.cpp, when the module is imported.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "ngram.h"

namespace py = pybind11;

namespace fulcrum {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
void require(const Array<T>& array, py::ssize_t size, const char* name) {
  if (array.ndim() != 1 || array.shape(0) != size) {
    throw py::value_error(std::string(name) + " must have one entry a sequence");
  }
}

NgramIndex make_index(int num_lanes, int max_match, int min_match) {
  if (num_lanes < 1 || max_match < min_match || min_match < 1) {
    throw py::value_error("num_lanes >= 1 and max_match >= min_match >= 1 are needed");
  }
  return NgramIndex(num_lanes, max_match, min_match);
}

void propose(NgramIndex& index, const Array<int32_t>& tokens, const Array<int32_t>& lanes,
             const Array<int64_t>& owners, const Array<int32_t>& lengths,
             const Array<int32_t>& max_drafts, Array<int32_t>& draft_ids,
             Array<int32_t>& num_drafts, Array<int32_t>& match_lengths) {
  const py::ssize_t B = lanes.size();
  require(lanes, B, "lanes");
  require(owners, B, "owners");
  require(lengths, B, "lengths");
  require(max_drafts, B, "max_drafts");
  require(num_drafts, B, "num_drafts");
  require(match_lengths, B, "match_lengths");
  if (tokens.ndim() != 2 || tokens.shape(0) != index.num_lanes()) {
    throw py::value_error("tokens must be (num_lanes, max_model_len)");
  }
  if (draft_ids.ndim() != 2 || draft_ids.shape(0) != B) {
    throw py::value_error("draft_ids must be (sequences, drafts)");
  }
  const py::ssize_t width = tokens.shape(1), K = draft_ids.shape(1);
  for (py::ssize_t i = 0; i < B; ++i) {
    if (lanes.data()[i] < 0 || lanes.data()[i] >= index.num_lanes() || lengths.data()[i] < 0 ||
        lengths.data()[i] > width || max_drafts.data()[i] > K) {
      throw py::index_error("a lane, a length or a number of drafts is out of range");
    }
  }
  // mutable_data raises where an array is read-only: asked for before the GIL is released.
  int32_t* ids = draft_ids.mutable_data();
  int32_t* counts = num_drafts.mutable_data();
  int32_t* matches = match_lengths.mutable_data();
  const int32_t* table = tokens.data();
  const int32_t* lane_of = lanes.data();
  const int64_t* owner_of = owners.data();
  const int32_t* length_of = lengths.data();
  const int32_t* max_of = max_drafts.data();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < B; ++i) {
    const NgramDraft draft = index.propose(lane_of[i], owner_of[i], table + lane_of[i] * width,
                                           length_of[i], max_of[i], ids + i * K);
    counts[i] = draft.num_drafts;
    matches[i] = draft.match_length;
  }
}

}  // namespace
}  // namespace fulcrum

void bind_ngram(py::module_& m) {
  using namespace fulcrum;
  py::class_<NgramIndex>(m, "NgramIndex")
      .def(py::init(&make_index), py::arg("num_lanes"), py::arg("max_match") = 8,
           py::arg("min_match") = 1)
      .def("propose", &propose, py::arg("tokens").noconvert(), py::arg("lanes").noconvert(),
           py::arg("owners").noconvert(), py::arg("lengths").noconvert(),
           py::arg("max_drafts").noconvert(), py::arg("draft_ids").noconvert(),
           py::arg("num_drafts").noconvert(), py::arg("match_lengths").noconvert())
      .def_property_readonly("num_bytes", &NgramIndex::num_bytes);
}
