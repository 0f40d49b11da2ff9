"""tools.prune_draft on tiny random models: what it drops, writes and learns, and that it drafts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engine.checkpoint.gguf import GgufFile  # noqa: E402
from engine.checkpoint.safetensors import read_file  # noqa: E402
from engine.checkpoint.sources import resolve  # noqa: E402
from engine.config import EngineConfig  # noqa: E402
from engine.contents import open_checkpoint  # noqa: E402
from engine.loader import load_model, read_headers  # noqa: E402
from tests.engine.oracle import make_checkpoint, reference_logits  # noqa: E402
from tests.engine.tiny_model import tiny_config  # noqa: E402
from tools import prune_draft  # noqa: E402
from tools.prune.decoder import Decoder  # noqa: E402
from tools.prune.layers import choose_layers, kept_spec, kept_tensors  # noqa: E402
from tools.prune.write import write_model  # noqa: E402

NUM_LAYERS = 4
CONTEXT = 32
SPARE_LAYER = 2  # adds next to nothing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one of whose layers is worth nothing."""
    folder: Path = tmp_path_factory.mktemp("whole")
    reference = make_checkpoint(folder, tiny_config(num_hidden_layers=NUM_LAYERS), seed=2)
    layer = reference.model.layers[SPARE_LAYER]
    for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
        matrix.weight.data *= 2**-6
    reference.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """What the model itself says, each window from its beginning: of low perplexity to it."""
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    # Ids are bytes; those of ASCII only, so that the text is one.
    ids = torch.arange(32, 127).repeat(2)[:, None]
    output = reference.generate(
        ids,
        do_sample=True,
        top_k=0,
        min_new_tokens=CONTEXT - 1,
        max_new_tokens=CONTEXT - 1,
        suppress_tokens=[13, *range(128, 256)],  # a carriage return is read as another character
    )
    path.write_bytes(bytes(output.flatten().tolist()))
    return path


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--context", str(CONTEXT), "--windows", "40", "--threads", "1"]
    return ["--model", str(model), "--text", str(text), "--out", str(out), *sizes, *more]


def test_the_layer_that_is_worth_least_goes_first(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "draft"
    options = arguments(model, text, out, "--drop", "1", "--distil-tokens", "0")
    assert prune_draft.main(options) == 0
    assert f"without layer {SPARE_LAYER}" in capsys.readouterr().err
    whole, pruned = read_file(model / "model.safetensors"), read_file(out / "model.safetensors")
    for new, old in enumerate([0, 1, 3]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert np.array_equal(pruned[name.format(new)].data, whole[name.format(old)].data)
    assert len(pruned) == len(whole) - 9
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3


def test_the_result_drafts_for_its_target_and_learns_from_it(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perplexities = []
    for tokens in ("0", "100000"):
        out = tmp_path / f"draft-{tokens}"
        options = arguments(model, text, out, "--drop", "2", "--distil-tokens", tokens)
        assert prune_draft.main(options) == 0
        perplexities.append(float(capsys.readouterr().out.rsplit(" ", 1)[1]))
    assert perplexities[1] < 0.95 * perplexities[0]
    config = EngineConfig(
        model=str(model), draft_model=str(out), speculation="draft", max_model_len=128
    )
    assert load_model(config).speculation.drafters == ("draft",)


def test_layers_are_tried_anew_for_each_one_that_goes() -> None:
    # 0 and 1 stand in for each other: either may go, but not both.
    def perplexity(kept: Any) -> float:
        return 10.0 + (not {0, 1} & set(kept)) * 50 + 3 * (2 not in kept) + 2 * (0 not in kept)

    lines: list[str] = []
    assert choose_layers(4, 2, perplexity, lines.append) in ([0, 2], [1, 2], [0, 2])
    assert choose_layers(4, 3, perplexity, lines.append) == [0]
    assert len(lines) == 2 + 5


def test_a_gguf_keeps_its_metadata_and_its_blocks(default_model_path: Path, tmp_path: Path) -> None:
    source = resolve(str(default_model_path))
    checkpoint = open_checkpoint(source)
    kept = [0, 5, 29]
    tensors = kept_tensors(checkpoint.spec, checkpoint.tensors, kept)
    write_model(source, tmp_path, tensors, len(kept))
    before, after = GgufFile(default_model_path), GgufFile(tmp_path / "model.gguf")
    assert after.metadata == before.metadata | {"llama.block_count": 3}
    assert len(after.tensors) == 3 * 9 + sum("blk" not in name for name in before.tensors)
    for name, tensor in after.tensors.items():
        _, layer, *rest = name.split(".") if name.startswith("blk") else ("", "", "")
        source_name = f"blk.{kept[int(layer)]}.{'.'.join(rest)}" if layer else name
        assert tensor.block_type == before.tensors[source_name].block_type
        assert np.array_equal(tensor.data, before.tensors[source_name].data)
    again = open_checkpoint(resolve(str(tmp_path / "model.gguf")))
    assert again.spec == kept_spec(checkpoint.spec, kept)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_decoder_that_learns_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, tiny_config(kind, tie_word_embeddings=False), seed=4)
    checkpoint = read_headers(EngineConfig(model=str(tmp_path))).checkpoint
    ids = np.random.default_rng(1).integers(0, 256, 40)
    with torch.no_grad():
        logits = Decoder(checkpoint.spec, checkpoint.tensors)(torch.from_numpy(ids)[None])[0]
    assert np.abs(logits.numpy() - reference_logits(reference, ids.tolist())).max() < 1e-3


def test_what_cannot_be_pruned_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "draft"
    assert prune_draft.main(arguments(model, text, out, "--drop", "4")) == 2
    assert "--drop 4: the model has 4 layers" in capsys.readouterr().err
    folder = tmp_path / "mixed"
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    mixed = tiny_config("qwen2", num_hidden_layers=NUM_LAYERS, **windows)
    make_checkpoint(folder, mixed, seed=1)
    assert prune_draft.main(arguments(folder, text, out, "--drop", "1")) == 2
    assert "layers of several kinds" in capsys.readouterr().err
    assert not out.exists()
