"""Multi-token-prediction modules: their tensors, where they fit, and how the core takes them.

A module is one decoder layer of the target's own kind between an input projection and a norm, in
the names of DeepSeek-V3's checkpoints (Technical Report, section 2.2). The loader calls it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fulcrum_core
import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.checkpoint import safetensors
from engine.checkpoint.tensor import BLOCK_TYPES, CheckpointError, StoredTensor
from engine.models.core_config import core_config
from engine.models.spec import ModelSpec

# Slots of the core beside those of the layer.
MODULE_NAMES: Mapping[str, str] = {
    "embedding_norm": "enorm.weight",
    "hidden_norm": "hnorm.weight",
    "input_projection": "eh_proj.weight",
    "final_norm": "shared_head.norm.weight",
}
LAYER_NAMES: Mapping[str, str] = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "attention_output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
DRAFT_IDS_NAME = "draft_token_ids"
_CONFIG_NAME = "config.json"
# Of all matrices: a draft need not be exact, and its time is that of reading them. Against int8 the
# head of SmolLM2 drafts in two thirds of the time and loses 0.003 of its acceptance.
_FORMAT = "int4"
_WIDE_FORMAT = "int8"  # of rows that are no multiple of int4's groups
_GROUP_SIZE = 32
_MATRICES = frozenset(
    ("input_projection", "q", "k", "v", "attention_output", "gate", "up", "down", "output")
)


class MtpHead(msgspec.Struct, frozen=True, kw_only=True):
    """A module's tensors by slot, and the tokens that its head drafts."""

    origin: str  # for the start-up table
    tensors: Mapping[str, StoredTensor]
    draft_ids: NDArray[np.int32] | None = None  # (V_draft,), None: all
    chains_normed: bool = False  # goes on from its own output after the final norm, not before
    norm_offset: float = 0.0  # added to every norm weight
    acceptance_by_position: tuple[float, ...] = ()  # as measured when it was trained
    tokens_per_step: float | None = None  # likewise


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """config.json of a trained head: the model that it was trained for, and how it fared."""

    target: str
    target_digest: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    acceptance_by_position: tuple[float, ...]
    tokens_per_step: float


def target_digest(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> str:
    """Identify a model by its shape and its final norm, which every format keeps exactly."""
    norm = tensors[spec.tensor_names["final_norm"]].floats()
    bits = norm.astype(np.float32).view(np.uint32) >> 16  # as bf16
    shape = (spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.vocab_size)
    digest = hashlib.sha256(msgspec.json.encode(shape))
    digest.update(bits.astype(np.uint16).tobytes())
    return digest.hexdigest()[:16]


def read_head(folder: Path) -> tuple[HeadConfig, MtpHead]:
    """Read a trained head. Raises CheckpointError naming what is wrong."""
    path = folder / _CONFIG_NAME
    try:
        config = msgspec.json.decode(path.read_bytes(), type=HeadConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: is no trained head: {error}") from None
    tensors = safetensors.read_folder(folder)
    by_slot = {}
    for slot, name in {**MODULE_NAMES, **LAYER_NAMES}.items():
        if name not in tensors:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        by_slot[slot] = tensors[name]
    ids = tensors.get(DRAFT_IDS_NAME)
    if ids is None or ids.block_type != "I32" or len(ids.shape) != 1:
        raise CheckpointError(f"{folder}: {DRAFT_IDS_NAME} must be a list of int32")
    draft_ids = ids.data.view(np.int32).copy()
    return config, MtpHead(
        origin=f"head {folder.name}",
        tensors=by_slot,
        draft_ids=draft_ids,
        acceptance_by_position=config.acceptance_by_position,
        tokens_per_step=config.tokens_per_step,
    )


def find_head(heads: Path, spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> MtpHead | None:
    """The head in one of the folders of `heads` that was trained for this model, if any."""
    digest = target_digest(spec, tensors)
    for path in sorted(heads.glob(f"*/{_CONFIG_NAME}")):
        config, head = read_head(path.parent)
        if config.target_digest == digest:
            return head
    return None


def load_module(
    target: fulcrum_core.Model,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    head: MtpHead,
    num_kv_blocks: int,
) -> fulcrum_core.Model:
    """Make the core's module beside its target, whose threads, embedding and head it shares.

    `tensors` are the target's. Raises CheckpointError where the module does not fit it.
    """
    module = fulcrum_core.Model(module_config(spec, head), target)
    for slot, tensor in head.tensors.items():
        _load(module, slot, tensor, head.norm_offset)
    if head.draft_ids is not None:
        _load_head_rows(module, spec, tensors, head.draft_ids)
    module.share_embedding(target)
    module.finalize()
    module.allocate_kv(num_kv_blocks, target.kv_dtype)
    return module


def module_config(spec: ModelSpec, head: MtpHead) -> fulcrum_core.Config:
    """The core's form of a module beside a target of this spec."""
    one_layer = replace(
        spec, num_layers=1, layer_windows=(0,), layer_rope_index=spec.layer_rope_index[-1:]
    )
    config = core_config(one_layer)
    config.reads_hidden = True
    config.chains_normed = head.chains_normed
    return config


def _format(num_cols: int) -> str:
    return _WIDE_FORMAT if num_cols % _GROUP_SIZE else _FORMAT


def module_weights_bytes(head: MtpHead, spec: ModelSpec, isa: str) -> int:
    """Bytes of a module's own weights, packed: what `load_module` will take."""
    num_bytes = 0
    for slot, tensor in head.tensors.items():
        if slot in _MATRICES:
            num_rows, num_cols = tensor.shape
            num_bytes += fulcrum_core.packed_bytes(isa, _format(num_cols), num_rows, num_cols)
        else:
            num_bytes += tensor.num_values * 4
    if head.draft_ids is not None:
        num_rows, num_cols = len(head.draft_ids), spec.hidden_size
        num_bytes += fulcrum_core.packed_bytes(isa, _format(num_cols), num_rows, num_cols)
    return num_bytes


def _load(module: Any, slot: str, tensor: StoredTensor, norm_offset: float) -> None:
    layer = -1 if slot in MODULE_NAMES or slot == "output" else 0
    try:
        if slot not in _MATRICES:
            offset = norm_offset if slot.endswith("norm") else 0.0
            module.load_vector(slot, layer, tensor.floats() + np.float32(offset))
            return
        if len(tensor.shape) != 2:
            raise ValueError("is no matrix")
        rows, cols = tensor.shape
        module.load_matrix(slot, layer, tensor.block_type, tensor.data, rows, cols, _format(cols))
    except ValueError as error:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name}: {error}") from error


def _load_head_rows(
    module: Any,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    draft_ids: NDArray[np.int32],
) -> None:
    """Give the module the rows of the head that it drafts (FR-Spec, Zhao et al. 2025)."""
    slot = "embedding" if spec.tied_embeddings else "output"
    matrix = tensors[spec.tensor_names[slot]]
    rows, cols = matrix.shape
    if draft_ids.size == 0 or draft_ids.min() < 0 or draft_ids.max() >= rows:
        raise CheckpointError(f"{DRAFT_IDS_NAME}: ids lie outside the model's {rows} tokens")
    block = BLOCK_TYPES[matrix.block_type]
    row_bytes = cols // block.num_values * block.num_bytes
    chosen = np.ascontiguousarray(matrix.data.reshape(rows, row_bytes)[draft_ids])
    module.set_head_ids(draft_ids)
    module.load_matrix(
        "output", -1, matrix.block_type, chosen.reshape(-1), len(draft_ids), cols, _format(cols)
    )
