"""Pairing tensors with slots and formats: nothing is skipped, and every choice is explained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.checkpoint.tensor import BLOCK_TYPES, CheckpointError, StoredTensor
from engine.config import Quantization
from engine.models import spec_from_config
from engine.models.spec import ModelSpec
from engine.models.weights import WeightPlan, load_weights, plan_weights


def _spec(architecture: str = "LlamaForCausalLM", **values: Any) -> ModelSpec:
    config = {
        "architectures": [architecture],
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 50,
        "max_position_embeddings": 128,
        **values,
    }
    return spec_from_config(config, {}, "config.json")


def _tensors(spec: ModelSpec, matrix_type: str = "F16") -> dict[str, StoredTensor]:
    tensors = {}
    for slot in spec.tensor_slots():
        block_type = BLOCK_TYPES[matrix_type if slot.is_matrix else "F32"]
        num_bytes = int(np.prod(slot.shape)) // block_type.num_values * block_type.num_bytes
        tensors[slot.tensor_name] = StoredTensor(
            slot.tensor_name,
            slot.shape,
            block_type.name,
            np.zeros(num_bytes, np.uint8),
            Path("model.gguf"),
        )
    return tensors


def _plan(
    spec: ModelSpec, tensors: dict[str, StoredTensor], quantization: Quantization = "auto"
) -> WeightPlan:
    return plan_weights(spec, tensors, quantization, "folder")


def test_a_missing_tensor_is_named() -> None:
    spec = _spec()
    tensors = _tensors(spec)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"folder: tensor model\.layers\.1\.mlp\.up_proj"):
        _plan(spec, tensors)


def test_a_tensor_that_is_left_over_is_named_and_known_buffers_are_not() -> None:
    spec = _spec()
    tensors = _tensors(spec)
    buffer = tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = buffer
    _plan(spec, tensors)
    tensors["model.layers.0.self_attn.q_proj.bias"] = buffer
    with pytest.raises(CheckpointError, match=r"q_proj\.bias has no place in a llama model"):
        _plan(spec, tensors)
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = buffer  # a layer more than the config has
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj"):
        _plan(spec, tensors)


def _transposed(tensor: StoredTensor) -> StoredTensor:
    shape = tensor.shape[::-1]
    return StoredTensor(tensor.name, shape, tensor.block_type, tensor.data, tensor.path)


def _of_integers(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.name, tensor.shape, "I64", tensor.data, tensor.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_transposed, r"shape \(256, 128\), expected \(128, 256\)"), (_of_integers, "is I64")],
)
def test_a_tensor_of_the_wrong_shape_or_type_is_named(
    change: Callable[[StoredTensor], StoredTensor], message: str
) -> None:
    spec = _spec()
    tensors = _tensors(spec)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = change(tensors[name])
    with pytest.raises(CheckpointError, match=rf"k_proj\.weight .*{message}"):
        _plan(spec, tensors)


def test_the_head_may_be_tied_by_the_config_or_by_its_absence() -> None:
    untied = _tensors(_spec())
    assert "output" in {item.slot.slot for item in _plan(_spec(), untied).tensors}
    tied = _plan(_spec(tie_word_embeddings=True), untied)  # the file's own head is ignored
    del untied["lm_head.weight"]
    absent = _plan(_spec(), untied)
    for plan in (tied, absent):
        assert "output" not in {item.slot.slot for item in plan.tensors}


@pytest.mark.parametrize(
    ("block_type", "quantization", "layers", "embedding"),
    [
        ("Q4_0", "auto", "int4", "int4"),
        ("Q4_1", "auto", "int4", "int4"),
        ("Q2_K", "auto", "int4", "int4"),
        ("Q4_K", "auto", "int4", "int4"),
        ("Q5_1", "auto", "int8", "int8"),
        ("Q6_K", "auto", "int8", "int8"),
        ("Q8_0", "auto", "int8", "int8"),
        ("BF16", "auto", "int8", "int8"),
        ("F32", "none", "bf16", "bf16"),
        ("Q4_0", "none", "bf16", "bf16"),
        ("Q4_0", "int8", "int8", "int8"),
        ("F16", "int4", "int4", "int8"),
        ("Q8_0", "int4", "int4", "int8"),
        ("Q4_1", "int4", "int4", "int4"),
        ("Q4_0", "int4-sym", "int4-sym", "int4-sym"),
        ("Q4_1", "int4-sym-g64", "int4-sym-g64", "int8"),
        ("Q4_1", "int4-g128", "int4-g128", "int8"),
        ("BF16", "int8-channel", "int8-channel", "int8"),
        ("BF16", "fp8", "fp8", "int8"),
    ],
)
def test_formats_follow_the_block_type_or_the_option(
    block_type: str, quantization: Quantization, layers: str, embedding: str
) -> None:
    spec = _spec()
    plan = _plan(spec, _tensors(spec, block_type), quantization)
    formats = {item.slot.slot: item.format for item in plan.tensors}
    assert formats["down"] == layers
    assert formats["embedding"] == formats["output"] == embedding
    assert formats["final_norm"] is None
    assert f"{layers} (" in plan.formats


def test_the_reason_says_what_is_rounded() -> None:
    spec = _spec()
    assert "Q4_1 → int4)" in _plan(spec, _tensors(spec, "Q4_1")).reason
    assert "Q6_K → int8 rounded" in _plan(spec, _tensors(spec, "Q6_K")).reason
    assert "half the bytes of bf16" in _plan(spec, _tensors(spec, "F16")).reason
    asked = _plan(spec, _tensors(spec, "BF16"), "none")
    assert asked.reason == "--quantization none: BF16 → bf16"
    assert asked.formats == "int4 (0), int8 (0), bf16 (16)"


class RecordingCore:
    """Keeps what it is given."""

    def __init__(self, refused: str = "") -> None:
        self.vectors: dict[tuple[str, int], NDArray[np.float32]] = {}
        self.matrices: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._refused = refused

    def load_vector(self, slot: str, layer: int, values: NDArray[np.float32]) -> None:
        self.vectors[slot, layer] = values

    def load_matrix(
        self,
        slot: str,
        layer: int,
        block_type: str,
        data: NDArray[np.uint8],
        num_rows: int,
        num_cols: int,
        format: str,
        interleaved_rope_heads: int = 0,
    ) -> None:
        if slot == self._refused:
            raise ValueError("not this one")
        self.matrices[slot, layer] = (block_type, num_rows, num_cols, interleaved_rope_heads)


def _load(core: RecordingCore, spec: ModelSpec, tensors: dict[str, StoredTensor]) -> None:
    plan = _plan(spec, tensors)
    assert load_weights(core, spec, plan, lambda: "text", num_threads=2) == "text"


def test_every_tensor_reaches_the_core() -> None:
    core, spec = RecordingCore(), _spec()
    _load(core, spec, _tensors(spec))
    assert len(core.matrices) + len(core.vectors) == len(list(spec.tensor_slots()))
    assert core.matrices["k", 1] == ("F16", 128, 256, 0)


def test_gemma_norms_get_their_offset_and_nothing_else_does() -> None:
    core, spec = RecordingCore(), _spec("Gemma3ForCausalLM")
    _load(core, spec, _tensors(spec))
    assert core.vectors["q_norm", 0].shape == (64,)
    assert {float(values[0]) for values in core.vectors.values()} == {1.0}
    core, spec = RecordingCore(), _spec("Qwen2ForCausalLM")
    _load(core, spec, _tensors(spec))
    assert {float(values[0]) for values in core.vectors.values()} == {0.0}
    assert ("q_bias", 1) in core.vectors


def test_a_matrix_that_the_core_refuses_is_named() -> None:
    spec = _spec()
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: not this one"):
        _load(RecordingCore(refused="down"), spec, _tensors(spec))
