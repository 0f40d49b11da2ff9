// Binds tokenizer/bpe.h for engine/tokenizer/bpe.py. Called once, by bindings.cpp, when the module
// is imported.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer/bpe.h"

namespace py = pybind11;

namespace fulcrum {
namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

std::unique_ptr<Bpe> make_bpe(const Int32Array& byte_ids, const Int32Array& merges,
                              std::unordered_map<uint32_t, int32_t> char_ids, bool per_char,
                              int32_t unknown_id, bool fuse_unknown,
                              std::unordered_map<std::string, int32_t> whole_words) {
  if (byte_ids.ndim() != 1 || byte_ids.shape(0) != 256) {
    throw py::value_error("byte_ids must have shape (256,)");
  }
  if (merges.ndim() != 2 || merges.shape(1) != 3) {
    throw py::value_error("merges must have shape (M, 3)");
  }
  const size_t num_merges = static_cast<size_t>(merges.shape(0));
  for (size_t i = 0; i < 3 * num_merges; ++i) {
    if (merges.data()[i] < 0) throw py::value_error("merges must not hold negative ids");
  }
  InitialSymbols initial;
  initial.byte_ids.assign(byte_ids.data(), byte_ids.data() + 256);
  initial.char_ids = std::move(char_ids);
  initial.per_char = per_char;
  initial.unknown_id = unknown_id;
  initial.fuse_unknown = fuse_unknown;
  return std::make_unique<Bpe>(std::move(initial), MergeTable(merges.data(), num_merges),
                               std::move(whole_words));
}

std::vector<int32_t> encode(const Bpe& bpe, const py::list& words) {
  // The views stay valid without the GIL: `words` owns the strings, and its caller does not
  // change it meanwhile.
  std::vector<std::string_view> views;
  views.reserve(words.size());
  for (const py::handle word : words) {
    Py_ssize_t num_bytes = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(word.ptr(), &num_bytes);
    if (bytes == nullptr) throw py::error_already_set();
    views.emplace_back(bytes, static_cast<size_t>(num_bytes));
  }
  std::vector<int32_t> ids;
  {
    py::gil_scoped_release release;
    ids.reserve(2 * views.size());
    for (const std::string_view view : views) bpe.encode_word(view, &ids);
  }
  return ids;
}

}  // namespace
}  // namespace fulcrum

void bind_tokenizer(py::module_& m) {
  using namespace fulcrum;
  py::class_<Bpe>(m, "Bpe")
      .def(py::init(&make_bpe), py::kw_only(), py::arg("byte_ids"), py::arg("merges"),
           py::arg("char_ids"), py::arg("per_char"), py::arg("unknown_id"), py::arg("fuse_unknown"),
           py::arg("whole_words"))
      .def("encode", &encode, py::arg("words"));
}
