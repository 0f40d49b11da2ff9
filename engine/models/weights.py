"""Which tensor goes into which slot of the core in which format, and the loading itself.

The loader plans first, so that whatever is wrong with a file is said before anything is loaded.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.checkpoint.tensor import BLOCK_TYPES, CheckpointError, StoredTensor
from engine.config import Quantization
from engine.models.spec import ModelSpec, TensorSlot

# What a file's block type becomes by itself: the format of about its own size. Floats become
# int8, which reads half the bytes of bf16 for each token and costs next to no quality.
_FORMAT_OF_BLOCK_TYPE = {
    "F32": "int8",
    "F16": "int8",
    "BF16": "int8",
    "Q4_0": "int4",
    "Q4_1": "int4",
    "Q5_0": "int8",
    "Q5_1": "int8",
    "Q8_0": "int8",
    "Q2_K": "int4",
    "Q3_K": "int4",
    "Q4_K": "int4",
    "Q5_K": "int8",
    "Q6_K": "int8",
}
_EXACT = frozenset(
    (
        ("Q4_0", "int4"),
        ("Q4_1", "int4"),
        ("Q4_0", "int4-sym"),
        ("Q4_0", "int8"),
        ("Q5_0", "int8"),
        ("Q8_0", "int8"),
        ("BF16", "bf16"),
    )
)
_USUAL_FORMATS = ("int4", "int8", "bf16")

Result = TypeVar("Result")


class PlannedTensor(msgspec.Struct, frozen=True):
    """One tensor on its way into the core. A vector has no format: it stays float32."""

    slot: TensorSlot
    tensor: StoredTensor
    format: str | None


class WeightPlan(msgspec.Struct, frozen=True):
    """All tensors of a model, with what the start-up table says about them."""

    tensors: tuple[PlannedTensor, ...]
    formats: str  # how many matrices of each format: "int4 (210), int8 (1), bf16 (0)"
    reason: str  # why these formats


class WeightCore(Protocol):
    """The part of the core that takes weights."""

    def load_vector(self, slot: str, layer: int, values: NDArray[np.float32]) -> None: ...

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
    ) -> None: ...


def plan_weights(
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    quantization: Quantization,
    source: str,
) -> WeightPlan:
    """Pair every slot of `spec` with its tensor and a format.

    Raises CheckpointError, naming the tensor, where one is missing, left over, of the wrong
    shape or of a type that holds no weights. `source` names the checkpoint in errors.
    """
    planned = []
    for slot in spec.tensor_slots():
        tensor = tensors.get(slot.tensor_name)
        if tensor is None:
            if slot.is_optional:
                continue
            raise CheckpointError(f"{source}: tensor {slot.tensor_name} is missing")
        _check(slot, tensor)
        chosen = _matrix_format(slot.slot, tensor.block_type, quantization)
        planned.append(PlannedTensor(slot, tensor, chosen if slot.is_matrix else None))
    used = {item.slot.tensor_name for item in planned}
    for name, tensor in tensors.items():
        if name not in used and not spec.ignores(name):
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has no place in a {spec.family} model"
            )
    matrices = [item for item in planned if item.format is not None]
    return WeightPlan(tuple(planned), _summary(matrices), _reason(matrices, quantization))


def load_weights(
    core: WeightCore,
    spec: ModelSpec,
    plan: WeightPlan,
    meanwhile: Callable[[], Result],
    *,
    num_threads: int,
    niceness: int = 0,
) -> Result:
    """Give the core all its weights; the result of `meanwhile`, run while it packs matrices.

    The largest matrices come first; the core releases the GIL meanwhile.
    """
    matrices = [item for item in plan.tensors if item.format is not None]
    matrices.sort(key=lambda item: item.tensor.data.size, reverse=True)
    # Niceness is a thread's own: the core's threads, made before, keep theirs.
    with ThreadPoolExecutor(
        num_threads, initializer=_lower_priority, initargs=(niceness,)
    ) as executor:
        loading = [executor.submit(_load_matrix, core, spec, item) for item in matrices]
        try:
            _load_vectors(core, spec, plan)
            result = meanwhile()
            for future in loading:
                future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return result


def _lower_priority(niceness: int) -> None:
    if niceness:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _load_vectors(core: WeightCore, spec: ModelSpec, plan: WeightPlan) -> None:
    for item in plan.tensors:
        if item.format is None:
            values = item.tensor.floats()
            if item.slot.slot.endswith("norm"):
                values += np.float32(spec.norm_offset)
            core.load_vector(item.slot.slot, item.slot.layer, values)


def _load_matrix(core: WeightCore, spec: ModelSpec, item: PlannedTensor) -> None:
    assert item.format is not None
    slot, tensor = item.slot, item.tensor
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads} if spec.has_interleaved_rope else {}
    try:
        core.load_matrix(
            slot.slot,
            slot.layer,
            tensor.block_type,
            tensor.data,
            tensor.shape[0],
            tensor.shape[1],
            item.format,
            heads.get(slot.slot, 0),
        )
    except ValueError as error:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name}: {error}") from error


def _check(slot: TensorSlot, tensor: StoredTensor) -> None:
    if tensor.shape != slot.shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} has shape {tensor.shape}, expected {slot.shape}"
        )
    if tensor.block_type not in BLOCK_TYPES:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} is {tensor.block_type}; weights must be one of "
            f"{', '.join(BLOCK_TYPES)}"
        )


def _matrix_format(slot: str, block_type: str, quantization: Quantization) -> str:
    if quantization == "none":
        return "bf16"
    if quantization == "auto":
        return _FORMAT_OF_BLOCK_TYPE[block_type]
    if slot in ("embedding", "output") and (block_type, quantization) not in _EXACT:
        # Rounding these costs about as much quality as all other matrices together; int8 rounds
        # least. Perplexity of SmolLM2-135M with and without it: fp8 20.58, 20.98; int8-channel
        # 20.15, 20.17.
        return "int8"
    return quantization


def _summary(matrices: Sequence[PlannedTensor]) -> str:
    counts = Counter(item.format for item in matrices)
    others = sorted(name for name in counts if name and name not in _USUAL_FORMATS)
    return ", ".join(f"{name} ({counts[name]})" for name in (*others, *_USUAL_FORMATS))


def _reason(matrices: Sequence[PlannedTensor], quantization: Quantization) -> str:
    pairs = Counter((item.tensor.block_type, item.format or "") for item in matrices)
    ways = ", ".join(
        f"{block_type} → {format}" + ("" if (block_type, format) in _EXACT else " rounded")
        for (block_type, format), _ in pairs.most_common()
    )
    if quantization != "auto":
        return f"--quantization {quantization}: {ways}"
    if all(item.tensor.block_type in ("F32", "F16", "BF16") for item in matrices):
        return f"auto: float weights are kept in 8 bits, half the bytes of bf16 ({ways})"
    return f"auto: each matrix as the file stores it ({ways})"
