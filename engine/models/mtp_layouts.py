"""The multi-token-prediction module that a checkpoint brings itself, in the layouts that there are.

Names and the order of operations are those of the published models: DeepSeek-V3 (Technical
Report, section 2.2) and GLM-4.5, MiMo, and Qwen3-Next. Of several modules the first one is used.
"""

from collections.abc import Mapping

import msgspec
import numpy as np
from msgspec.structs import replace

from engine.checkpoint.tensor import BLOCK_TYPES, CheckpointError, StoredTensor
from engine.models.mtp import MtpHead
from engine.models.spec import ModelSpec

_LAYER_PREFIX = "model.layers.{layer}."


class ModuleLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of checkpoint names a module; {layer} is the number of the model's layers."""

    name: str
    prefix: str  # of the names outside of the module's layer
    layer_prefix: str
    names: Mapping[str, str]
    reads_hidden_first: bool  # order in the input projection; DeepSeek's has the embedding first
    chains_normed: bool  # what the module reads of itself for the second draft on


LAYOUTS = (
    ModuleLayout(
        name="DeepSeek-V3",
        prefix=_LAYER_PREFIX,
        layer_prefix=_LAYER_PREFIX,
        names={
            "embedding_norm": "enorm.weight",
            "hidden_norm": "hnorm.weight",
            "input_projection": "eh_proj.weight",
            "final_norm": "shared_head.norm.weight",
        },
        reads_hidden_first=False,
        chains_normed=False,
    ),
    ModuleLayout(
        name="MiMo",
        prefix="model.mtp_layers.0.",
        layer_prefix="model.mtp_layers.0.",
        names={
            "embedding_norm": "token_layernorm.weight",
            "hidden_norm": "hidden_layernorm.weight",
            "input_projection": "input_proj.weight",
            "final_norm": "final_layernorm.weight",
        },
        reads_hidden_first=True,
        chains_normed=True,
    ),
    ModuleLayout(
        name="Qwen3-Next",
        prefix="mtp.",
        layer_prefix="mtp.layers.0.",
        names={
            "embedding_norm": "pre_fc_norm_embedding.weight",
            "hidden_norm": "pre_fc_norm_hidden.weight",
            "input_projection": "fc.weight",
            "final_norm": "norm.weight",
        },
        reads_hidden_first=False,
        chains_normed=True,
    ),
)
# Copies of what the model has already, under the module's prefix.
_SHARED = {"embedding": "embed_tokens.weight", "output": "shared_head.head.weight"}


def find_module(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> MtpHead | None:
    """The checkpoint's own module, or None where it neither has nor announces one.

    Raises CheckpointError where one is announced and missing, where a part of it is missing, or
    where it holds what this engine does not compute.
    """
    for layout in LAYOUTS:
        prefix = layout.prefix.format(layer=spec.num_layers)
        is_announced = layout.prefix != _LAYER_PREFIX or spec.num_announced_modules > 0
        if is_announced and any(name.startswith(prefix) for name in tensors):
            return _read_module(spec, tensors, layout)
    if spec.num_announced_modules:
        path = next(iter(tensors.values())).path.parent
        raise CheckpointError(
            f"{path}: config.json announces {spec.num_announced_modules} multi-token-prediction "
            "module(s), but the files hold none; --speculation ngram or off serves without it"
        )
    return None


def _read_module(
    spec: ModelSpec, tensors: Mapping[str, StoredTensor], layout: ModuleLayout
) -> MtpHead:
    prefix = layout.prefix.format(layer=spec.num_layers)
    layer_prefix = layout.layer_prefix.format(layer=spec.num_layers)
    names = {slot: prefix + name for slot, name in layout.names.items()}
    for slot, name in spec.tensor_names.items():
        if name.startswith(_LAYER_PREFIX):
            names[slot] = layer_prefix + name.removeprefix(_LAYER_PREFIX)
    shared = {slot: prefix + name for slot, name in _SHARED.items()}
    module = {}
    for slot, name in names.items():
        if name not in tensors:
            path = next(iter(tensors.values())).path.parent
            raise CheckpointError(
                f"{path}: tensor {name} of the multi-token-prediction module is missing; "
                "--speculation ngram or off serves without it"
            )
        module[slot] = tensors[name]
    if layout.reads_hidden_first:
        module["input_projection"] = _swap_halves(module["input_projection"])
    output = _own_head(spec, tensors, shared)
    if output is not None:
        module["output"] = output
    _refuse_others(tensors, {*names.values(), *shared.values()}, (prefix, layer_prefix))
    return MtpHead(
        origin=f"the checkpoint's own module ({layout.name})",
        tensors=module,
        chains_normed=layout.chains_normed,
        norm_offset=spec.norm_offset,
    )


def _own_head(
    spec: ModelSpec, tensors: Mapping[str, StoredTensor], shared: Mapping[str, str]
) -> StoredTensor | None:
    """The module's head where it is another one than the model's; the embedding must not be."""
    embedding = tensors.get(shared["embedding"])
    own = tensors[spec.tensor_names["embedding"]]
    if embedding is not None and not _is_same(embedding, own):
        raise CheckpointError(
            f"{embedding.path}: tensor {embedding.name} is not the model's own embedding; a module "
            "with an embedding of its own is not supported"
        )
    head = tensors.get(shared["output"])
    name = spec.tensor_names["embedding" if spec.tied_embeddings else "output"]
    return None if head is None or _is_same(head, tensors.get(name, own)) else head


def _is_same(one: StoredTensor, other: StoredTensor) -> bool:
    return one.block_type == other.block_type and np.array_equal(one.data, other.data)


def _refuse_others(
    tensors: Mapping[str, StoredTensor], known: set[str], prefixes: tuple[str, str]
) -> None:
    """A module with parts that nobody computes would draft nonsense."""
    _, layer_prefix = prefixes
    later_modules = layer_prefix.removesuffix("0.")
    for name, tensor in tensors.items():
        if name.startswith(later_modules) and not name.startswith(layer_prefix):
            continue
        if name.startswith(prefixes) and name not in known and not name.endswith("inv_freq"):
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has no place in a multi-token-prediction module of "
                "this family; --speculation ngram or off serves without it"
            )


def _swap_halves(projection: StoredTensor) -> StoredTensor:
    """A projection of [hidden, embedding] as one of [embedding, hidden]."""
    block = BLOCK_TYPES.get(projection.block_type)
    if block is None or block.num_values != 1 or len(projection.shape) != 2:
        raise CheckpointError(f"{projection.path}: tensor {projection.name} is no float matrix")
    halves = projection.data.reshape(projection.shape[0], 2, -1)
    return replace(projection, data=np.ascontiguousarray(halves[:, ::-1]).reshape(-1))
