// Bindings of the drafter over numpy buffers.
#include <stdexcept>

#include "bindings_model.h"
#include "draft.h"

namespace fulcrum {
namespace {

// A drafter and the arrays that it reads and writes.
class BoundDrafter {
 public:
  BoundDrafter(BoundModel& model, int max_tokens, int max_sequences, int max_drafts)
      : drafter_(model.model, max_tokens, max_sequences, max_drafts),
        hidden_size_(model.model.config().hidden_size),
        max_sequences_(max_sequences),
        max_drafts_(max_drafts) {}

  void bind(const py::kwargs& buffers) {
    BoundBuffers next;
    for (const auto& [name, array] : buffers) {
      next.add(name.cast<std::string>(), array.cast<py::array>());
    }
    DraftTexts texts;
    fill_texts(next, &texts);
    DraftCall call;
    fill_call(next, &call);
    drafter_.bind(texts, call);
    buffers_ = std::move(next);
  }

  void propose(int num_sequences, float min_confidence) {
    drafter_.propose(num_sequences, min_confidence);
  }

 private:
  void fill_texts(const BoundBuffers& in, DraftTexts* texts) const {
    texts->max_length = static_cast<int>(in.width("tokens"));
    texts->max_blocks = static_cast<int>(in.width("blocks"));
    if (texts->max_length == 0) fail_buffer("tokens", "must be (lanes, tokens)");
    if (texts->max_blocks == 0) fail_buffer("blocks", "must be (lanes, blocks)");
    const int64_t lanes = in.get("tokens", &texts->tokens, texts->max_length);
    texts->num_lanes = static_cast<int>(lanes);
    require_size(in.get("blocks", &texts->blocks, texts->max_blocks), lanes, "blocks");
    require_size(in.get("temperature", &texts->temperature), lanes, "temperature");
    require_size(in.get("top_p", &texts->top_p), lanes, "top_p");
    require_size(in.get("min_p", &texts->min_p), lanes, "min_p");
    require_size(in.get("top_k", &texts->top_k), lanes, "top_k");
    require_size(in.get("seed", &texts->seed), lanes, "seed");
    float* hidden = nullptr;
    const int64_t rows = in.get_writable("hidden", &hidden, hidden_size_, /*optional=*/true);
    texts->hidden = hidden;
    texts->hidden_window = static_cast<int>(rows / lanes);
  }

  void fill_call(const BoundBuffers& in, DraftCall* call) const {
    const auto column = [&](const char* name, const int32_t** pointer) {
      require_size(in.get(name, pointer), max_sequences_, name);
    };
    column("lanes", &call->lanes);
    column("begin", &call->begin);
    column("end", &call->end);
    column("start", &call->start);
    column("num_drafts", &call->num_drafts);
    const auto result = [&](const char* name, auto** pointer, int64_t width) {
      require_size(in.get_writable(name, pointer, width, false), max_sequences_, name);
    };
    result("draft_ids", &call->draft_ids, max_drafts_);
    result("draft_probs", &call->draft_probs, max_drafts_);
    result("num_drafted", &call->num_drafted, 0);
  }

  Drafter drafter_;
  BoundBuffers buffers_;
  const int hidden_size_, max_sequences_, max_drafts_;
};

}  // namespace
}  // namespace fulcrum

void bind_draft(pybind11::module_& m) {
  namespace py = pybind11;
  using fulcrum::BoundDrafter;
  using fulcrum::BoundModel;
  py::class_<BoundDrafter>(m, "Drafter")
      .def(py::init<BoundModel&, int, int, int>(), py::arg("model"), py::arg("max_tokens"),
           py::arg("max_sequences"), py::arg("max_drafts"), py::keep_alive<1, 2>())
      .def("bind", [](BoundDrafter& self, const py::kwargs& buffers) { self.bind(buffers); })
      .def(
          "propose",
          [](BoundDrafter& self, int num_sequences, float min_confidence) {
            py::gil_scoped_release release;
            self.propose(num_sequences, min_confidence);
          },
          py::arg("num_sequences"), py::arg("min_confidence") = 0.0f);
}
